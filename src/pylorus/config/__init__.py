"""The configuration: its schema, checks and help."""
