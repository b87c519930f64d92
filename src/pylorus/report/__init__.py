"""Reports on runs: tables, figures, reporting checklists and the comparison with published results."""
