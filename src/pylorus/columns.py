"""Names of columns that several tables share."""

ABOUT = "about/"
"""Prefix of the columns that come from the user's manifest, in the catalog and in prediction tables."""
