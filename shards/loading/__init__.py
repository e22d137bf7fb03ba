"""From shards to pixels: the index, PK batches for training, sequential passes for features."""
