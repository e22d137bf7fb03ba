"""The one error type of the data side: what a user can cause with files, layouts or shards."""


class DataError(ValueError):
    """One line that names the file, shard or key, its value, and the remedy."""
