"""One run in several processes: one per GPU, or sharing a CPU, on one machine or under SLURM."""
