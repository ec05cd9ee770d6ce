"""Conversations: reading, templates, preferences, attributes."""
