"""Text to samples: sources, mixtures, tokens, packing, batches."""
