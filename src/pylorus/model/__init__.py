"""The network: a timm backbone with a new classification head, its weights, freezing, and one training step."""
