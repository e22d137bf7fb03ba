"""The folder of shards as a source of exact bytes: local, or behind any fsspec URL.

    dataset.json, index.parquet, *.tar ──▶ [source] ──▶ index, cache, reader

A remote request that fails, or whose answer is cut short, is repeated with growing pauses. What is returned has
the length that was asked for; whether it is right is checked by those who know its checksum.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fsspec.core import url_to_fs

from shards.errors import DataError
from shards.storage import join, local_path

ATTEMPTS = 8
PAUSE_S = 0.05  # doubles after every attempt: 6.35 s in all
T = TypeVar("T")


class ShardSource:
    """Reads files directly below one folder. Pickles as its URL."""

    def __init__(self, url: str):
        self.url = url
        self.local_root: Path | None = local_path(url)
        self._fs = self._root = None

    def __reduce__(self):
        return ShardSource, (self.url,)

    def where(self, name: str) -> str:
        return join(self.url, name)

    def read(self, name: str) -> bytes:
        """A whole small file. Raises FileNotFoundError, or DataError when the source keeps failing."""
        if self.local_root is not None:
            return (self.local_root / name).read_bytes()
        return self._retried(name, lambda fs, path: fs.cat_file(path))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Exactly bytes start ... stop-1 of a file. Raises like `read`."""

        def once(fs, path) -> bytes:
            data = fs.cat_file(path, start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came for the {stop - start} at {start} that were asked for")
            return data

        if self.local_root is None:
            return self._retried(name, once)
        with open(self.local_root / name, "rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise DataError(f"{self.where(name)}: ends before byte {stop}, which the index lists; copy it again")
        return data

    def state(self, name: str) -> list:
        """What changes when the file does: its size, and its time or tag where the source has one."""
        if self.local_root is not None:
            stat = (self.local_root / name).stat()
            return [stat.st_size, stat.st_mtime_ns]

        def once(fs, path) -> list:
            fs.invalidate_cache()
            info = fs.info(path)
            return [info.get("size"), *(str(info.get(tag, "")) for tag in ("ETag", "LastModified", "mtime"))]

        return self._retried(name, once)

    def _retried(self, name: str, request: Callable[..., T]) -> T:
        if self._fs is None:
            self._fs, self._root = url_to_fs(self.url)
        path = self._root.rstrip("/") + "/" + name
        for attempt in range(ATTEMPTS):
            try:
                return request(self._fs, path)
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:  # every fsspec backend has its own types for a broken connection
                if attempt == ATTEMPTS - 1:
                    raise DataError(
                        f"{self.where(name)}: failed {ATTEMPTS} times, at last with {type(error).__name__}: {error}; "
                        "check the network and the address"
                    ) from error
            time.sleep(PAUSE_S * 2**attempt)
        raise AssertionError("unreachable")
