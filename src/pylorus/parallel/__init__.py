"""One run in several processes: one a GPU, or parts of a CPU, on one machine or on SLURM's."""
