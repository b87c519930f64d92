"""A run from the outside: its folder, process and signals, predictions, and what a report reads of it."""
