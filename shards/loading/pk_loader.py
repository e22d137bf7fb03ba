"""PK batches: the sampler's plan as pixels.

    pk_sampler (rows) + reader (bytes) + decode (pixels) ──▶ [PK loader] ──▶ stage 2 (augmentation, encoder, losses)

In:  a packed dataset, PKSettings, and which rank of how many this is.
Out: this rank's whole identities of every global batch, uint8. Augmentation is done later, on the device.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shards.errors import DataError
from shards.loading.cache import DEFAULT_CACHE, CacheSettings, Prefetcher
from shards.loading.decode import decode_row
from shards.loading.decode_pool import DecodePool
from shards.loading.index import ShardIndex
from shards.loading.pk_sampler import PKSettings, epoch_plan, rank_part, shards_needed
from shards.loading.reader import RowReader, shard_cache

log = logging.getLogger(__name__)


@dataclass
class PKBatch:
    """One rank's part of a global batch: b = P / world_size * K images, identity after identity."""

    images: Tensor
    """uint8 [b, 3, H, W]"""
    labels: Tensor
    """int64 [b], 0 ... N-1"""
    cameras: Tensor
    """int64 [b], -1 is unknown"""
    views: Tensor
    """int64 [b], -1 is unknown"""
    positions: Tensor
    """int64 [b], place in the global batch, 0 ... P*K-1"""
    rows: Tensor
    """int64 [b], row in the training split"""
    identities: Tensor
    """int64 [P] on the CPU, labels of the whole global batch, in its order"""
    epoch: int
    """From 1."""
    epoch_step: int
    """From 1, within the epoch."""


class PKLoader:
    """Iterates over one rank's parts of the PK batches of an epoch, from any step on."""

    def __init__(
        self,
        index: ShardIndex,
        *,
        settings: PKSettings,
        image_size: tuple[int, int],
        rank: int,
        world_size: int,
        num_loaders: int = 0,
        on_error: str = "raise",
        skip_limit: int = 100,
        cache: CacheSettings = DEFAULT_CACHE,
        pin_memory: bool = False,
        prefetch: int = 4,
    ):
        """
        Args:
            image_size: (H, W), pixels.
            num_loaders: decoding processes; 0 decodes in this process.
            on_error: what an image that can't be read does: "raise", or "skip": the next readable image of its
                identity, in index order, takes the place. After `skip_limit` different ones it is an error too.
            cache: the node's, for remote shards.
            pin_memory: batches lie in page-locked memory, for copies to the GPU beside its work.
            prefetch: batches that the decoding processes are ahead.

        Raises DataError for settings that don't fit the dataset or the number of ranks.
        """
        if on_error not in ("raise", "skip"):
            raise DataError(f"data.on_error is {on_error!r}; known: raise, skip")
        self.split = index.split("train")
        self.settings, self.rank, self.world_size = settings, rank, world_size
        self.pin_memory = pin_memory
        self._skip_limit = skip_limit
        self._skipped: set[int] = set()
        self._plans: dict[int, np.ndarray] = {}
        batch_size = rank_part(self._plan(1), rank, world_size)[0].size
        shards = shard_cache(index, cache)
        self._prefetcher = Prefetcher(shards) if shards else None
        fill = FillBatch(RowReader(self.split, shards, fetch=False), on_error)
        self._pool = DecodePool(fill, __name__, (batch_size, 3, *image_size), num_loaders, prefetch)

    def steps_per_epoch(self, epoch: int) -> int:
        return len(self._plan(epoch))

    def epoch(self, epoch: int, first_step: int = 1) -> Iterator[PKBatch]:
        """Batches `first_step` ... of an epoch, both counted from 1. Raises DataError for an unreadable image."""
        part = self._part(epoch)[first_step - 1 :]
        if self._prefetcher:
            coming = [*shards_needed(self.split, part), *shards_needed(self.split, self._part(epoch + 1))]
            self._prefetcher.start([self.split.shard_names[shard] for shard in dict.fromkeys(coming)])
        results = self._pool.run((epoch, rows) for rows in part)
        for epoch_step, ((rows, skipped), slot) in enumerate(results, first_step):
            self._count_skipped(skipped)
            identities = self.split.labels[self._plan(epoch)[epoch_step - 1, :, 0]]
            yield self._batch_of(rows, slot, identities, epoch, epoch_step)

    @property
    def num_skipped(self) -> int:
        """Different images that could not be read so far (`on_error="skip"`)."""
        return len(self._skipped)

    def close(self) -> None:
        self._pool.close()
        if self._prefetcher:
            self._prefetcher.close()

    def _part(self, epoch: int) -> np.ndarray:
        return rank_part(self._plan(epoch), self.rank, self.world_size)

    def _plan(self, epoch: int) -> np.ndarray:
        if epoch not in self._plans:
            self._plans[epoch] = epoch_plan(self.split, self.settings, epoch)
            while len(self._plans) > 2:  # this epoch's and the next one's
                del self._plans[next(iter(self._plans))]
        return self._plans[epoch]

    def _batch_of(
        self, rows: np.ndarray, slot: np.ndarray, identities: np.ndarray, epoch: int, epoch_step: int
    ) -> PKBatch:
        images = torch.empty(slot.shape, dtype=torch.uint8, pin_memory=self.pin_memory)
        images.copy_(torch.from_numpy(slot))

        def tensor(column: np.ndarray) -> Tensor:
            return torch.from_numpy(column).pin_memory() if self.pin_memory else torch.from_numpy(column)

        return PKBatch(
            images=images,
            labels=tensor(self.split.labels[rows]),
            cameras=tensor(self.split.cameras[rows]),
            views=tensor(self.split.views[rows]),
            positions=tensor(np.arange(len(rows)) + self.rank * len(rows)),
            rows=tensor(rows),
            identities=torch.from_numpy(identities),
            epoch=epoch,
            epoch_step=epoch_step,
        )

    def _count_skipped(self, skipped: list[tuple[int, str]]) -> None:
        for row, message in skipped:
            if row not in self._skipped:
                self._skipped.add(row)
                log.warning("skipped, %d of at most %d: %s", len(self._skipped), self._skip_limit, message)
            if len(self._skipped) > self._skip_limit:
                raise DataError(
                    f"more than {self._skip_limit} images (data.skip_limit) can't be read, the last one: {message}"
                )


class FillBatch:
    """Reads, decodes and resizes the images of one job; runs in the decoding processes."""

    def __init__(self, reader: RowReader, on_error: str):
        self.reader, self.split, self.on_error = reader, reader.split, on_error
        self._epoch = 0

    def __call__(self, job: tuple[int, np.ndarray], slot: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """job: epoch, and rows int64 [p, K], an identity per line.

        Returns the rows whose images are in the slot, int64 [p*K], and (row, why) of those that were skipped.
        """
        epoch, rows = job
        if epoch != self._epoch:  # the shards of the last one may make room in the cache
            self.reader.release()
            self._epoch = epoch
        used = rows.reshape(-1).copy()
        skipped: list[tuple[int, str]] = []
        for place, data in enumerate(self.reader.read(used)):
            row = int(used[place])
            error = self._decode(row, data, slot[place])
            if error is not None:
                if self.on_error == "raise":
                    raise error
                skipped.append((row, str(error)))
                used[place] = self._substitute(row, slot[place], skipped)
        return used, skipped

    def _decode(self, row: int, data: np.ndarray | DataError, out: np.ndarray) -> DataError | None:
        """Fill the place of a row; returns why that can't be done."""
        remedy = "repair or drop the source image and re-pack, or set data.on_error=skip"
        try:
            decode_row(self.split, row, data, out, "bicubic", remedy)
        except DataError as error:
            return error
        return None

    def _substitute(self, row: int, out: np.ndarray, skipped: list[tuple[int, str]]) -> int:
        """Fill the place of an unreadable image with the next readable one of its identity; returns its row."""
        same = np.flatnonzero(self.split.labels == self.split.labels[row])
        start = int(np.searchsorted(same, row))
        for other in [*same[start + 1 :].tolist(), *same[:start].tolist()]:
            error = self._decode(other, self.reader.read([other])[0], out)
            if error is None:
                return other
            skipped.append((other, str(error)))
        raise DataError(
            f"{self.split.where(row)}: no image of identity {self.split.identity_of(row)} can be read; copy the shard "
            "again, or drop the identity and re-pack"
        )
