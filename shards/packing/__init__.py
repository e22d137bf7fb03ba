"""From a raw dataset to tar shards and an index, and whether they still are what was packed."""
