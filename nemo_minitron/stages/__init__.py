"""Stages: one job a file, readable from top to bottom; and what starts them, records them and strings them together."""
