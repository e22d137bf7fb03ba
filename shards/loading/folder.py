"""A plain folder of images, every image once, in the order of the names: for extraction without packing.

    folder (or zip, or URL) ──▶ [folder] ──▶ uint8 batches, as those of sequential passes

Decoded and resized as packed images are, so an image has the same pixels either way.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from shards.errors import DataError, StoreError
from shards.loading.decode import decode, resize_into
from shards.loading.decode_pool import Pool
from shards.loading.sequential import ImageBatch
from shards.storage import Source


class FolderLoader:
    """One rank's part of the images below a folder, in order; `rows` of a batch are numbers into `names`."""

    def __init__(
        self,
        root: str,
        names: list[str],
        *,
        image_size: tuple[int, int],
        rank: int,
        world_size: int,
        batch_size: int,
        workers: int = 0,
    ):
        """names: paths below the root. image_size: (H, W), pixels. workers: decoding processes; 0 = this one."""
        self.image_size, self.batch_size = image_size, batch_size
        self.start, self.stop = len(names) * rank // world_size, len(names) * (rank + 1) // world_size
        fill = FillFolder(Source(root), names, image_size)
        workers = min(workers, len(self))
        self._pool = Pool(fill, workers, 2 * workers, batch_size * 3 * math.prod(image_size))

    def __len__(self) -> int:
        """Batches."""
        return -(-(self.stop - self.start) // self.batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        """Raises DataError, naming the file, for an image that can't be read."""
        starts = range(self.start, self.stop, self.batch_size)
        jobs = [(start, min(start + self.batch_size, self.stop)) for start in starts]
        try:
            for (start, stop), slot in self._pool.run(jobs):
                shape = (stop - start, 3, *self.image_size)
                images = torch.from_numpy(slot[: math.prod(shape)].copy()).view(shape)
                yield ImageBatch(images, torch.arange(start, stop))
        finally:
            self._pool.close()


class FillFolder:
    """Reads, decodes and resizes; runs in the decoding processes."""

    def __init__(self, source: Source, names: list[str], image_size: tuple[int, int]):
        self.source, self.names, self.image_size = source, names, image_size

    def __call__(self, job: tuple[int, int], slot: np.ndarray) -> tuple[int, int]:
        """job: images start ... stop-1. Returns it."""
        start, stop = job
        shape = (stop - start, 3, *self.image_size)
        out = slot[: math.prod(shape)].reshape(shape)
        for name, place in zip(self.names[start:stop], out, strict=True):
            try:
                image = decode(np.frombuffer(bytearray(self.source.read(name)), np.uint8))
            except StoreError:  # the store fails, not the image
                raise
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{self.source.root}/{name}: can't be read as an image ({error}); repair it, or take it out"
                ) from error
            resize_into(place, image, "bilinear")
        return job
