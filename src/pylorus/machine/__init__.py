"""What a run computes on: accelerator, precision, memory, and what is chosen for them."""
