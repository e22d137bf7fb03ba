"""Every image of a split or a folder once, in order: feature extraction and evaluation.

    tar images | folder images ── decode pool ──▶ [sequential] ──▶ stage 1's features, evaluation, extraction

Rank r of R takes images n*r/R ... n*(r+1)/R, cut into batches; decoding processes share the batches out. This is exact
for any number of ranks and processes: nothing is padded or dropped.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shards.loading.decode_pool import DecodePool


@dataclass
class ImageBatch:
    images: Tensor
    """uint8 [b, 3, H, W]; the last batch may be smaller."""
    rows: Tensor
    """int64 [b], row numbers in the split, or in the folder's list of names."""


class OrderedImages(Protocol):
    """Images of one size in a fixed order. Pickled for the decoding processes."""

    image_size: tuple[int, int]
    """(H, W), pixels."""

    def __len__(self) -> int: ...

    def read_into(self, out: np.ndarray, start: int, stop: int) -> None:
        """Write images start ... stop-1 to `out`, uint8 [stop - start, 3, H, W].

        Raises DataError, naming the image, for one that can't be read.
        """

    def fetching_ahead(self, start: int, stop: int) -> AbstractContextManager[None]:
        """While it is open, what images start ... stop-1 need is fetched before they are asked for."""


class SequentialLoader:
    """One rank's part of the images, in order. Can be iterated any number of times."""

    def __init__(self, images: OrderedImages, *, rank: int, world_size: int, batch_size: int, num_loaders: int = 0):
        """num_loaders: decoding processes; 0 decodes in this process."""
        self.images, self.batch_size = images, batch_size
        self.start, self.stop = len(images) * rank // world_size, len(images) * (rank + 1) // world_size
        num_loaders = min(num_loaders, len(self))
        slot_shape = (batch_size, 3, *images.image_size)
        preload = type(images).__module__
        self._pool = DecodePool(partial(_fill, images), preload, slot_shape, num_loaders, 2 * num_loaders)

    def __len__(self) -> int:
        """Batches."""
        return -(-(self.stop - self.start) // self.batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        """Raises DataError, naming the image, for one that can't be read."""
        starts = range(self.start, self.stop, self.batch_size)
        jobs = [(start, min(start + self.batch_size, self.stop)) for start in starts]
        with self.images.fetching_ahead(self.start, self.stop), closing(self._pool):
            for (start, stop), slot in self._pool.run(jobs):
                yield ImageBatch(torch.from_numpy(slot[: stop - start]).clone(), torch.arange(start, stop))


def _fill(images: OrderedImages, job: tuple[int, int], slot: np.ndarray) -> tuple[int, int]:
    start, stop = job
    images.read_into(slot[: stop - start], start, stop)
    return job
