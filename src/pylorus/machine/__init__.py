"""The hardware a run computes on: accelerator, precision, memory, and the settings chosen for them."""
