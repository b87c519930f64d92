"""Sweeps of many runs: the launchers that start them, each in its own process, and the table of their results."""
