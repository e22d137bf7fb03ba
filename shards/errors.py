"""The error types of the data side: what a user can cause with files, layouts or shards."""

from collections.abc import Sequence


class DataError(ValueError):
    """One line that names the file, shard or key, its value, and the remedy."""


class DamagedError(DataError):
    """A file of a packed dataset that is not as it was written."""


class StoreError(DataError, OSError):
    """A remote store that can't be reached, refuses access or keeps failing."""


class AccessError(StoreError):
    """A remote store that refuses access."""


class NotAFileError(DataError, OSError):
    """A pipe, socket or device where a file is expected."""


MOST_SHOWN = 120
"""Characters of a value in a message."""


def shown(value: object) -> str:
    """A value as Python writes it, the end of a long one left out."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


NAMED = 5
"""Examples in one message."""


def examples(names: Sequence[str]) -> str:
    """Up to five names, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
