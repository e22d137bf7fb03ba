"""The bytes of images, by row of a split: checked, and read in as few pieces as possible.

    index + shards -> [reader] -> decode

Local shards are memory-mapped. Of remote ones only the bytes that are needed are read, in one request where the
images lie together, as those of one identity do.
"""

import mmap
import zlib
from collections.abc import Sequence

import numpy as np

from shards.errors import DataError
from shards.index import SplitIndex
from shards.source import ShardSource

GAP_BYTES = 1 << 20
"""Images less than this apart are read with one request: about what a request's round trip costs."""


class RowReader:
    """Reads images of one split. Holds maps of the shards it has touched until `release`."""

    def __init__(self, split: SplitIndex):
        self.split = split
        self.source: ShardSource = split.index.source
        self._maps: dict[str, np.ndarray] = {}

    def read(self, rows: Sequence[int]) -> list[np.ndarray | DataError]:
        """Each row's bytes, uint8 [size], checksum right; or the error that names its shard and key."""
        rows = np.asarray(rows)
        results: list[np.ndarray | DataError] = [None] * len(rows)
        shards = self.split.shard[rows]
        for shard in dict.fromkeys(shards.tolist()):
            places = np.flatnonzero(shards == shard)
            for place, data in zip(places, self._of_shard(shard, rows[places]), strict=True):
                results[place] = data
        return results

    def span(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start ... stop-1 of a shard, unchecked."""
        return self.source.read_range(name, start, stop)

    def release(self) -> None:
        """Let go of all shards."""
        self._maps.clear()

    def _of_shard(self, shard: int, rows: np.ndarray) -> list[np.ndarray | DataError]:
        name = self.split.shard_names[shard]
        starts, stops = self.split.offsets[rows], self.split.offsets[rows] + self.split.sizes[rows]
        if self.source.local_root is not None:
            whole = self._map(name)
            pieces = [whole[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        else:
            pieces = self._ranges(name, starts, stops)
        return [self._checked(row, piece) for row, piece in zip(rows.tolist(), pieces, strict=True)]

    def _map(self, name: str) -> np.ndarray:
        if name not in self._maps:
            try:
                with open(self.source.local_root / name, "rb") as file:
                    # A private writable map: torch takes no read-only arrays. Nothing is ever written to it.
                    self._maps[name] = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
            except (FileNotFoundError, ValueError) as error:
                raise DataError(f"{self.source.where(name)}: missing or empty; copy it again or re-pack") from error
        return self._maps[name]

    def _ranges(self, name: str, starts: np.ndarray, stops: np.ndarray) -> list[np.ndarray]:
        pieces: list[np.ndarray] = [None] * len(starts)
        order = np.argsort(starts, kind="stable")
        cuts = np.flatnonzero(starts[order[1:]] - np.maximum.accumulate(stops[order])[:-1] > GAP_BYTES) + 1
        for places in np.split(order, cuts):
            first, last = int(starts[places].min()), int(stops[places].max())
            data = np.frombuffer(bytearray(self.source.read_range(name, first, last)), np.uint8)
            for place in places:
                pieces[place] = data[starts[place] - first : stops[place] - first]
        return pieces

    def _checked(self, row: int, data: np.ndarray) -> np.ndarray | DataError:
        if zlib.crc32(data) == self.split.crc32[row]:
            return data
        return DataError(
            f"{self.split.where(row)}: its bytes don't fit the checksum in the index; copy the shard again, or re-pack"
        )
