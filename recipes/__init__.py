"""Recipes for published shapes, one file per model."""
