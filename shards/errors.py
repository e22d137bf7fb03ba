"""The error types of the data side: what a user can cause with files, layouts or shards.

Their texts name URLs, so what is secret in one is left out here, for them and for all else that is shown or kept.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

_USER_AND_PASSWORD = re.compile(r"(?<=://)[^/\s'\"<>]*@")
_SECRET_IN_QUERY = re.compile(
    r"([?&][^=&\s]*(?:token|secret|signature|password|credential|sig|key)[^=&\s]*=)[^&\s'\"<>]+", re.IGNORECASE
)


def masked(text: str) -> str:
    """A text without what is secret in its URLs: user and password go, and of a signed address the signature."""
    return _SECRET_IN_QUERY.sub(r"\1***", _USER_AND_PASSWORD.sub("", text))


def mask_logs() -> None:
    """From now on this process logs no secrets, whoever logs."""
    make = logging.getLogRecordFactory()
    if getattr(make, "masks", False):
        return

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        made = make(*args, **options)
        if "://" in (text := made.getMessage()):
            made.msg, made.args = masked(text), None
        return made

    record.masks = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)


class DataError(ValueError):
    """One line that names the file, shard or key, its value, and the remedy."""

    def __str__(self) -> str:
        return masked(super().__str__())


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
