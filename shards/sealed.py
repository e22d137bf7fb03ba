"""JSON that carries a checksum of itself, so that another bit in it is found when it is read.

    facts ──▶ [seal] ──▶ file ──▶ [unseal] ──▶ facts, or SealError

A file without one, as earlier versions wrote it, is taken as it is.
"""

import hashlib
import json
from typing import Any

SEAL = "sha256"
"""The key that `seal` adds; files may have no key of this name themselves."""


class SealError(ValueError):
    """Not what was written. The message says how that shows, without the file's name."""


def seal(facts: dict[str, Any]) -> dict[str, Any]:
    return facts | {SEAL: digest(facts)}


def unseal(data: bytes) -> dict[str, Any]:
    """The facts in a file's bytes. Raises SealError."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SealError(f"not JSON: {error}" if data.strip(b"\0 \n") else "empty") from None
    if not isinstance(tree, dict):
        raise SealError("holds no keys and values")
    written = tree.pop(SEAL, None)
    if written is not None and written != digest(tree):
        raise SealError("its checksum says that it was changed since it was written")
    return tree


def digest(facts: Any) -> str:
    """Of the values as JSON has them, however they are laid out in a file."""
    plain = json.loads(json.dumps(facts))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
