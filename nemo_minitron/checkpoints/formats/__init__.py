"""Checkpoint formats: a package or a module each."""
