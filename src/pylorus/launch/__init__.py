"""One run from start to end, resuming, sweeps, several processes."""
