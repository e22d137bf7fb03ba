"""The folder of shards as a source of exact bytes: local, or behind any fsspec URL.

    dataset.json, index.parquet, *.tar ──▶ [source] ──▶ index, cache, reader

A remote request that fails, or whose answer is cut short, is repeated (`remote.py`). What is returned has the
length that was asked for; whether it is right is checked by those who know its checksum.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.remote import OPEN, READ, Patience, file_system, read_range, retried
from shards.storage import join, local_path, open_regular, read_bytes


class ShardSource:
    """Reads files directly below one folder. Pickles as its URL."""

    def __init__(self, url: str):
        self.url = url
        self.local_root: Path | None = local_path(url)
        self._remote: tuple[Any, str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSource, (self.url,)

    def where(self, name: str) -> str:
        return join(self.url, name)

    def read(self, name: str) -> bytes:
        """A whole small file. Raises FileNotFoundError, or DataError when the source keeps failing."""
        if self.local_root is not None:
            return read_bytes(str(self.local_root / name))
        return self._retried(name, OPEN, lambda fs, path: fs.cat_file(path))

    def state(self, name: str) -> list:
        """What changes when the file does: its size, and its time or tag where the source has one. Raises as `read`."""
        if self.local_root is not None:
            stat = (self.local_root / name).stat()
            return [stat.st_size, stat.st_mtime_ns]

        def once(fs: Any, path: str) -> list:
            fs.invalidate_cache()
            info = fs.info(path)
            return [info.get("size"), *(str(info.get(tag, "")) for tag in ("ETag", "LastModified", "mtime"))]

        return self._retried(name, OPEN, once)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Exactly bytes start ... stop-1 of a shard. Raises DataError."""
        try:
            if self.local_root is not None:
                return self._read_local(self.local_root / name, start, stop)
            return self._retried(name, READ, lambda fs, path: read_range(fs, path, start, stop))
        except FileNotFoundError as error:
            raise DataError(f"{self.where(name)}: no such file; copy it again or re-pack") from error

    def _read_local(self, path: Path, start: int, stop: int) -> bytes:
        with open_regular(path) as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise DataError(f"{self.where(path.name)}: ends before byte {stop}, which the index lists; copy it again")
        return data

    def _retried(self, name: str, patience: Patience, request: Callable[[Any, str], Any]) -> Any:
        if self._remote is None:
            self._remote = file_system(self.url)
        fs, root = self._remote
        return retried(self.where(name), lambda: request(fs, root.rstrip("/") + "/" + name), patience)
