"""A timm backbone with a new head: its weights, what learns in a stage, one step of training."""
