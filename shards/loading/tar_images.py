"""The images of a split in the order of the index, streamed out of its tar shards.

    index + shards ── tar members, webdataset ──▶ [tar images] ──▶ sequential loader

Neighbouring rows are a run of neighbouring tar members, and a part of a tar that starts and ends between members is a
tar, so just that part is read. `tar_members` gives its members, which webdataset groups: webdataset's own reader
believes what headers say of sizes.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import numpy as np
import webdataset
from webdataset.tariterators import group_by_keys

from shards.errors import DataError
from shards.format import TAR_BLOCK, BadTar, tar_members
from shards.loading.cache import DEFAULT_CACHE, CacheSettings, Prefetcher
from shards.loading.decode import decode_row
from shards.loading.index import ShardIndex
from shards.loading.reader import RowReader, shard_cache


class TarImages:
    """A split's images; `OrderedImages`. Damaged bytes of a cached or remote shard are fetched anew once."""

    def __init__(
        self, index: ShardIndex, split: str, image_size: tuple[int, int], cache: CacheSettings = DEFAULT_CACHE
    ):
        """image_size: (H, W), pixels. Raises DataError where the dataset has no such split."""
        self.split, self.image_size = index.split(split), image_size
        self.cache = shard_cache(index, cache)
        self.reader = RowReader(self.split, self.cache, fetch=True)

    def __len__(self) -> int:
        return len(self.split)

    def read_into(self, out: np.ndarray, start: int, stop: int) -> None:
        """Raises DataError that names shard and key."""
        try:
            self._stream(start, stop, out)
        except DataError:
            shards = np.unique(self.split.shard[start:stop])
            discarded = [self.reader.discard(self.split.shard_names[shard]) for shard in shards]
            if not any(discarded) and self.reader.source.local_root is not None:
                raise
            self._stream(start, stop, out)

    @contextmanager
    def fetching_ahead(self, start: int, stop: int) -> Iterator[None]:
        """Downloads the remote shards of these rows to the node's cache, in order."""
        if self.cache is None:
            yield
            return
        prefetcher = Prefetcher(self.cache)
        prefetcher.start([self.split.shard_names[shard] for shard in np.unique(self.split.shard[start:stop])])
        try:
            yield
        finally:
            prefetcher.close()

    def _stream(self, start: int, stop: int, out: np.ndarray) -> None:
        pipeline = webdataset.DataPipeline(partial(self._members, start, stop), group_by_keys)
        row = start
        try:
            for sample in pipeline:
                extension = next((name for name in sample if name != "json" and not name.startswith("__")), None)
                if extension is not None:
                    self._decode(row, sample["__key__"], sample[extension], out[row - start])
                    row += 1
        except DataError:
            raise
        except ValueError as error:  # BadTar; and webdataset's own for names that differ in capitals alone
            raise self._damaged(row, f"the archive is damaged there ({error.args[0]})") from error
        if row < stop:
            raise self._damaged(row, "the archive is damaged before it, or was cut short")

    def _decode(self, row: int, key: str, data: bytes, out: np.ndarray) -> None:
        if row >= len(self.split) or key != self.split.key(row):
            raise self._damaged(row, f"the archive holds key {key} in its place")
        if zlib.crc32(data) != self.split.crc32[row]:
            raise self._damaged(row, "its bytes don't fit the checksum in the index")
        decode_row(self.split, row, np.frombuffer(data, np.uint8), out, "bilinear")

    def _damaged(self, row: int, fault: str) -> DataError:
        return DataError(f"{self.split.where(row)}: {fault}; copy the shard again, or re-pack")

    def _members(self, start: int, stop: int) -> Iterator[dict[str, str | bytes]]:
        """The members of the parts of tars that hold the rows, as webdataset groups them; {} ends a part.

        Each reaches from the end of the image before its first row (whose JSON may follow, and is left over) to the
        end of its last row's image.
        """
        shards = self.split.shard[start:stop]
        firsts = start + np.flatnonzero(np.diff(shards, prepend=-1))
        for first, last in pairwise([*firsts.tolist(), stop]):
            follows = first > 0 and self.split.shard[first - 1] == self.split.shard[first]
            begin = self._end(first - 1) if follows else 0
            name = self.split.shard_names[self.split.shard[first]]
            names: set[str] = set()
            for member, data in tar_members(self.reader.span(name, begin, self._end(last - 1))):
                if member in names:
                    raise BadTar(f"{member[:80]!r} is there twice")
                names.add(member)
                yield {"fname": member, "data": data, "__url__": name}
            yield {}

    def _end(self, row: int) -> int:
        """Where the tar member of a row's image ends, with its padding."""
        end = int(self.split.offsets[row] + self.split.sizes[row])
        return -(-end // TAR_BLOCK) * TAR_BLOCK
