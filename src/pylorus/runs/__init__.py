"""A run from the outside: its folder, logs and dashboards, signals, faults, and how it is resumed."""
