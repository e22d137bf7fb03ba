"""The node's cache folder: what its processes share."""

import os
import tempfile
from pathlib import Path


def node_cache_dir(cache_dir: str | None) -> Path:
    """The node's cache folder; by default one of this user's own below the system's temporary folder."""
    return Path(cache_dir) if cache_dir else Path(tempfile.gettempdir()) / f"clipreid-cache-{os.getuid()}"
