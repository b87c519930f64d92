"""Names of columns that several tables share."""

ABOUT = "about/"
"""Begins the names of columns that a manifest brings along: of the catalog and of predictions."""
