"""Every image of a split once, in order: feature extraction and evaluation.

    index + shards ── webdataset ──▶ [sequential] ──▶ stage 1's features, evaluation, extraction

Rank r of R takes rows n*r/R ... n*(r+1)/R, cut into batches; loader processes share the batches out. A batch is a
run of neighbouring tar members, and a part of a tar that starts and ends between members is a tar, so webdataset
reads just that part. This is exact for any number of ranks, processes and shards: nothing is padded or dropped.
"""

import io
import math
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import webdataset
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from shards.errors import DataError
from shards.format import TAR_BLOCK
from shards.loading.cache import Prefetcher
from shards.loading.decode import decode, resize_into
from shards.loading.decode_pool import Pool
from shards.loading.index import ShardIndex
from shards.loading.reader import RowReader, shard_cache


@dataclass
class ImageBatch:
    images: Tensor
    """uint8 [b, 3, H, W]; the last batch may be smaller."""
    rows: Tensor
    """int64 [b], row numbers in the split."""


class SequentialLoader:
    """One rank's part of a split, in order. Can be iterated any number of times."""

    def __init__(
        self,
        index: ShardIndex,
        split: str,
        *,
        image_size: tuple[int, int],
        rank: int,
        world_size: int,
        batch_size: int,
        workers: int = 0,
        cache_dir: str | None = None,
        cache_bytes: int = 50_000_000_000,
        interpolation: str = "bilinear",
        pin_memory: bool = False,
    ):
        """
        Args:
            image_size: (H, W), pixels.
            workers: decoding processes; 0 decodes in this process.
            cache_dir, cache_bytes: the node's cache for remote shards; by default where the index has its own.
        """
        self.split = index.split(split)
        self.image_size, self.batch_size, self.pin_memory = image_size, batch_size, pin_memory
        total = len(self.split)
        self.start, self.stop = total * rank // world_size, total * (rank + 1) // world_size
        cache = shard_cache(index, cache_dir, cache_bytes)
        self._prefetcher = Prefetcher(cache) if cache else None
        fill = FillSequence(RowReader(self.split, cache, fetch=True), image_size, interpolation)
        workers = min(workers, len(self))
        self._pool = Pool(fill, workers, 2 * workers, batch_size * 3 * image_size[0] * image_size[1])

    def __len__(self) -> int:
        """Batches."""
        return -(-(self.stop - self.start) // self.batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        """Raises DataError, with shard and key, for an image that can't be read."""
        starts = range(self.start, self.stop, self.batch_size)
        jobs = [(start, min(start + self.batch_size, self.stop)) for start in starts]
        if self._prefetcher:
            shards = np.unique(self.split.shard[self.start : self.stop])
            self._prefetcher.start([self.split.shard_names[shard] for shard in shards])
        try:
            for (start, stop), slot in self._pool.run(jobs):
                shape = (stop - start, 3, *self.image_size)
                images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin_memory)
                images.view(-1).copy_(torch.from_numpy(slot[: images.numel()]))
                yield ImageBatch(images, torch.arange(start, stop))
        finally:
            self._pool.close()
            if self._prefetcher:
                self._prefetcher.close()


class FillSequence:
    """Streams, decodes and resizes neighbouring rows; runs in the decoding processes."""

    def __init__(self, reader: RowReader, image_size: tuple[int, int], interpolation: str):
        self.reader, self.split, self.image_size, self.interpolation = reader, reader.split, image_size, interpolation

    def __call__(self, job: tuple[int, int], slot: np.ndarray) -> tuple[int, int]:
        """job: rows start ... stop-1. Returns it. Damaged bytes of a cached or remote shard are fetched anew."""
        start, stop = job
        shape = (stop - start, 3, *self.image_size)
        out = slot[: math.prod(shape)].reshape(shape)
        try:
            self._stream(start, stop, out)
        except DataError:
            shards = np.unique(self.split.shard[start:stop])
            discarded = [self.reader.discard(self.split.shard_names[shard]) for shard in shards]
            if not any(discarded) and self.reader.source.local_root is not None:
                raise
            self._stream(start, stop, out)
        return job

    def _stream(self, start: int, stop: int, out: np.ndarray) -> None:
        pipeline = webdataset.DataPipeline(partial(self._parts, start, stop), tar_file_expander, group_by_keys)
        try:
            row = start
            for sample in pipeline:
                extension = next((name for name in sample if name != "json" and not name.startswith("__")), None)
                if extension is not None:
                    self._fill(row, sample["__key__"], sample[extension], out[row - start])
                    row += 1
        except tarfile.TarError as error:
            raise self._broken(row, f"the archive is damaged there ({error.args[0]})") from error
        if row < stop:
            raise self._broken(row, "the archive is damaged before it, or was cut short")

    def _fill(self, row: int, key: str, data: bytes, out: np.ndarray) -> None:
        if row >= len(self.split) or key != self.split.key(row):
            raise self._broken(row, f"the archive holds key {key} in its place")
        if zlib.crc32(data) != self.split.crc32[row]:
            raise self._broken(row, "its bytes don't fit the checksum in the index")
        try:
            resize_into(out, decode(np.frombuffer(bytearray(data), np.uint8)), self.interpolation)
        except ValueError as error:
            raise DataError(
                f"{self.split.where(row)}: can't be decoded ({error}); repair or drop the source image and re-pack"
            ) from error

    def _broken(self, row: int, what: str) -> DataError:
        return DataError(f"{self.split.where(row)}: {what}; copy the shard again, or re-pack")

    def _parts(self, start: int, stop: int) -> Iterator[dict]:
        """The tar parts that hold the rows, as webdataset's tar reader takes them.

        A part reaches from the end of the image before the first row (its JSON may follow, and is left over) to
        the end of the last row's image.
        """
        shards = self.split.shard[start:stop]
        firsts = start + np.flatnonzero(np.diff(shards, prepend=-1))
        for first, last in pairwise([*firsts.tolist(), stop]):
            follows = first > 0 and self.split.shard[first - 1] == self.split.shard[first]
            begin = self._end(first - 1) if follows else 0
            name = self.split.shard_names[self.split.shard[first]]
            yield {"url": name, "stream": io.BytesIO(self.reader.span(name, begin, self._end(last - 1)))}

    def _end(self, row: int) -> int:
        """Where the tar member of a row's image ends, with its padding."""
        end = int(self.split.offsets[row] + self.split.sizes[row])
        return -(-end // TAR_BLOCK) * TAR_BLOCK
