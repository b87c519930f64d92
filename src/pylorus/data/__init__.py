"""From image files to batches: catalog, split, decoding, augmentation, loading. Knows nothing of models."""
