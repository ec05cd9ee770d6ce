"""What several stages have in common."""
