"""What a reader sees of runs: tables, figures, the published results to compare with."""
