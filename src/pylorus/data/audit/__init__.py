"""Audit of an image set: find its problems before a model is trained on it."""
