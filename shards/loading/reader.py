"""The bytes of images, by row of a split: checked, and read in as few pieces as possible.

    index + shards (+ the node's cache) ──▶ [reader] ──▶ decode

Local and cached shards are memory-mapped. Of other remote ones only the bytes that are needed are read: one
request where the images lie together, as those of one identity do, and several requests at a time.
"""

import mmap
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np

from shards.errors import DataError
from shards.loading.cache import CacheSettings, ShardCache, node_cache_dir
from shards.loading.index import ShardIndex, SplitIndex
from shards.source import ShardSource
from shards.storage import open_regular

GAP_BYTES = 1 << 20
"""Images less than this apart are read with one request: about what a request's round trip costs."""
REQUESTS = 16
"""Ranges of a remote source that one process reads at a time."""
MAX_MAPS = 256
"""Shards that one process holds open, well below the usual limit of open files."""


def shard_cache(index: ShardIndex, settings: CacheSettings) -> ShardCache | None:
    """The node's cache for a remote dataset; None for a local one."""
    if index.source.local_root is not None:
        return None
    files = {
        name: {"bytes": index.shard_bytes(name), "crc32": index.files.get(name, {}).get("crc32")}
        for name in index.shard_names
    }
    folder = node_cache_dir(settings.folder or index.cache_dir)
    return ShardCache(index.source, files, index.address, folder, settings.limit_bytes)


class RowReader:
    """Reads images of one split. Holds maps of the shards it has touched until `release`. Pickles without them."""

    def __init__(self, split: SplitIndex, cache: ShardCache | None, fetch: bool):
        """
        Args:
            cache: the node's, for remote shards; None for local ones, or to read without one.
            fetch: download a remote shard that is not cached (for passes over whole shards), instead of reading
                only what is needed until a `Prefetcher` has brought it.
        """
        self.split, self.fetch, self._cache = split, fetch, cache
        self.source: ShardSource = split.index.source
        self._maps: dict[str, np.ndarray] = {}
        self._files: dict[str, BinaryIO] = {}  # their locks keep the maps' files in the cache
        self._requests: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RowReader, (self.split, self._cache, self.fetch)

    def read(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray | DataError]:
        """Each row's bytes, uint8 [size], checksum right; or the error that names its shard and key."""
        numbers = np.asarray(rows)
        starts = self.split.offsets[numbers]
        stops = starts + self.split.sizes[numbers]
        pieces = [np.empty(0, np.uint8)] * len(numbers)
        ranges: list[tuple[str, np.ndarray]] = []
        shards = self.split.shard[numbers]
        for shard in np.unique(shards):
            name, places = self.split.shard_names[shard], np.flatnonzero(shards == shard)
            whole = self._map(name)
            if whole is None:
                ranges += [(name, near) for near in _neighbours(places, starts, stops)]
            else:
                for place in places:
                    pieces[place] = whole[starts[place] : stops[place]]
        for places, first, data in self._read_ranges(ranges, starts, stops):
            for place in places:
                pieces[place] = data[starts[place] - first : stops[place] - first]
        return [self._checked(row, piece) for row, piece in zip(numbers.tolist(), pieces, strict=True)]

    def span(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start ... stop-1 of a shard, unchecked."""
        whole = self._map(name)
        return self.source.read_range(name, start, stop) if whole is None else whole[start:stop].tobytes()

    def release(self) -> None:
        """Let go of all shards, so that the cache may evict them."""
        for name in list(self._maps):
            self._drop(name)

    def discard(self, name: str) -> bool:
        """Drop the cached copy of a shard, which is damaged. False when there is none: its source is."""
        if self._cache is None or name not in self._maps:
            return False
        self._drop(name)
        return self._cache.discard(name)

    def _map(self, name: str) -> np.ndarray | None:
        """A whole local or cached shard; None for one that has to be read from its source."""
        if name not in self._maps:
            file = self._open(name)
            if file is None:
                return None
            if len(self._maps) == MAX_MAPS:
                self._drop(next(iter(self._maps)))
            self._files[name] = file
            self._maps[name] = _mapped(file, self.source.where(name))
        return self._maps[name]

    def _open(self, name: str) -> BinaryIO | None:
        """Raises DataError for a local shard that is not there."""
        if self.source.local_root is not None:
            try:
                return open_regular(self.source.local_root / name)
            except FileNotFoundError as error:
                raise DataError(f"{self.source.where(name)}: no such file; copy it again or re-pack") from error
        if self._cache is None:
            return None
        return self._cache.fetch(name) if self.fetch else self._cache.open(name)

    def _drop(self, name: str) -> None:
        del self._maps[name]
        self._files.pop(name).close()

    def _read_ranges(
        self, ranges: list[tuple[str, np.ndarray]], starts: np.ndarray, stops: np.ndarray
    ) -> Iterable[tuple[np.ndarray, int, np.ndarray]]:
        """One request for each (shard, neighbouring places); yields (places, first byte, data)."""

        def request(item: tuple[str, np.ndarray]) -> tuple[np.ndarray, int, np.ndarray]:
            name, places = item
            first = int(starts[places].min())
            data = self.source.read_range(name, first, int(stops[places].max()))
            return places, first, np.frombuffer(bytearray(data), np.uint8)

        if not ranges:
            return ()
        if self._requests is None:
            self._requests = ThreadPoolExecutor(REQUESTS)
        return self._requests.map(request, ranges)

    def _checked(self, row: int, data: np.ndarray) -> np.ndarray | DataError:
        if zlib.crc32(data.data) == self.split.crc32[row]:
            return data
        if self._cache is not None:  # damaged on the way or in the cache, if its source is not damaged too
            name, start = self.split.shard_names[self.split.shard[row]], int(self.split.offsets[row])
            again = self.source.read_range(name, start, start + int(self.split.sizes[row]))
            if zlib.crc32(again) == self.split.crc32[row]:
                if self.discard(name) and (file := self._cache.fetch(name)) is not None:
                    file.close()
                return np.frombuffer(bytearray(again), np.uint8)
        return DataError(
            f"{self.split.where(row)}: its bytes don't fit the checksum in the index; copy the shard again, or re-pack"
        )


def _mapped(file: BinaryIO, where: str) -> np.ndarray:
    """A private writable map, because torch takes no read-only arrays; nothing is ever written to it."""
    try:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    except ValueError as error:
        raise DataError(f"{where}: the file is empty; copy it again or re-pack") from error


def _neighbours(places: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> list[np.ndarray]:
    """Cut places in one shard into runs whose images lie close together."""
    order = places[np.argsort(starts[places], kind="stable")]
    reach = np.maximum.accumulate(stops[order])
    return np.split(order, np.flatnonzero(starts[order[1:]] - reach[:-1] > GAP_BYTES) + 1)
