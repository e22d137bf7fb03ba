"""Blocks of Euclidean distances between queries and gallery, never the whole matrix.

    descriptors of queries and gallery ──▶ [distance_blocks] ──▶ positives, top_k, tpr_at_fpr

Images are taken by identity, so that the positives lie in few blocks: those are made twice, once to read the
positives' distances and once to count. All matrix products have one fixed, padded shape, each is made by one thread,
and blocks do not depend on the number of ranks: so the value of a pair does not depend on ranks or threads, and equal
rows get equal values.

Q, G = query and gallery images, D = feature width; b, w = rows and columns of a block
"""

from collections.abc import Callable, Iterator
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clipreid.errors import ModelError
from clipreid.peers import ALONE, Peers
from clipreid.retrieval.positives import Labels, ascending, query_blocks
from clipreid.retrieval.progress import Progress, unreported
from clipreid.retrieval.rules import Rule
from clipreid.threads import in_threads

QUERY_BLOCK, GALLERY_BLOCK = 512, 1024  # rows of one product
SAMPLE = 1024


class FeatureRows(Protocol):
    """float [n, D], of which a few rows at a time are asked for: an array, memory-mapped or not, or the like."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray: ...


Work = Callable[[int, int, Tensor], None]
"""Is given the number of a query block, the first column, and the distances, float32 [b, w]."""


class DistanceBlocks:
    """This rank's blocks of |g|² - 2 q·g: |q|² is the same for a whole row and would only cost digits."""

    def __init__(
        self,
        query_features: Tensor,
        query: Labels,
        gallery_features: Tensor | FeatureRows,
        gallery: Labels,
        rule: Rule,
        peers: Peers = ALONE,
    ) -> None:
        """Arguments as in `retrieve`. Raises ModelError when a query's feature is not finite, or a rule not usable."""
        self.peers = peers
        self.device = query_features.device
        self.gallery = gallery_features
        self.labels = query, gallery
        self.order = _column_order(gallery)
        self.rows = torch.from_numpy(self.order).to(self.device)
        """Row number in the gallery of each column, int64 [G]."""
        columns = np.empty_like(self.order)
        columns[self.order] = np.arange(len(columns))
        self.query_order = np.argsort(query.identities, kind="stable")
        groups = [self.query_order[start : start + QUERY_BLOCK] for start in range(0, len(query_features), QUERY_BLOCK)]
        self.queries = list(query_blocks(query, gallery, rule, self.device, groups, columns))
        loaded = [self._load(query_features, block.rows, QUERY_BLOCK, "query") for block in self.queries]
        self.features = [features for features, _ in loaded]
        self.squared = [squared[: len(block.rows)] for block, (_, squared) in zip(self.queries, loaded, strict=True)]
        """|q|² of each block's queries, float32 [b]."""
        self.num_known = int(gallery.known.sum())
        """Columns of known identity; the others are behind them."""
        self.starts = _own_starts(len(self.order), peers)

    def each(self, work: Work, *, only_met: bool = False, progress: Progress = unreported) -> None:
        """Do some work, in threads on a CPU, with each block; on each query block in one thread at a time.

        only_met: without the pairs of blocks that have no identity in common. progress: in gallery images.
        Raises ModelError when a gallery image's feature is not finite.
        """
        total = self.starts.stop - self.starts.start
        locks = [Lock() for _ in self.queries]

        def tasks() -> Iterator[tuple[int, int, Tensor, Tensor, int]]:
            for start in self.starts:
                rows = self.order[start : start + GALLERY_BLOCK]
                numbers = [n for n, block in enumerate(self.queries) if not only_met or block.meets(start, len(rows))]
                if numbers:
                    gallery, squared = self._load(self.gallery, rows, GALLERY_BLOCK, "gallery")
                    for number in numbers:
                        yield number, start, gallery, squared, len(rows)
                progress(min(start + GALLERY_BLOCK, self.starts.stop) - self.starts.start, total)

        def multiply(number: int, start: int, gallery: Tensor, squared: Tensor, width: int) -> None:
            product = torch.addmm(squared, self.features[number], gallery.T, alpha=-2)
            with locks[number]:
                work(number, start, product[: len(self.queries[number].rows), :width])

        for _ in in_threads(multiply, tasks(), self.device):
            pass

    def sample_distance(self, rate: float) -> Tensor:
        """About how far this fraction of the negatives is at most, from a sample of pairs. float32 scalar."""
        number = np.linspace(0, len(self.query_order) - 1, SAMPLE).astype(int)
        queries = torch.stack([self.features[n // QUERY_BLOCK][n % QUERY_BLOCK] for n in number.tolist()])
        estimate = torch.zeros(2, device=self.device)
        if self.starts:
            rows = self.order[np.linspace(self.starts.start, self.starts.stop - 1, SAMPLE).astype(int)]
            gallery, squared = self._load(self.gallery, rows, SAMPLE, "gallery")
            distances = torch.addmm(squared, queries, gallery.T, alpha=-2) + queries.square().sum(1)[:, None]
            differ = self._differ(self.query_order[number], rows)
            negatives = ascending(distances[torch.from_numpy(differ).to(self.device)])
            estimate[0] = negatives[int(rate * len(negatives))] if len(negatives) else torch.inf
            estimate[1] = 1
        estimate = self.peers.all_reduce_sum(estimate)
        return estimate[0] / estimate[1]

    def _differ(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Which pairs of these queries and gallery rows are known to be of two identities. bool [queries, rows]."""
        query, gallery = self.labels
        known = np.outer(query.known[queries], gallery.known[rows])
        unlike: np.ndarray = known & (query.identities[queries, None] != gallery.identities[rows])
        return unlike

    def _load(self, source: Tensor | FeatureRows, numbers: np.ndarray, size: int, name: str) -> tuple[Tensor, Tensor]:
        """These rows, filled up with zeros to [size, D], and their squared norms [size]."""
        rows = source[torch.from_numpy(numbers)] if isinstance(source, Tensor) else source[numbers]
        padded = torch.zeros(size, rows.shape[1], device=self.device)
        padded[: len(rows)] = torch.as_tensor(rows)
        squared = padded.square().sum(1)
        if not squared.isfinite().all():
            row = numbers[int(squared.isfinite().logical_not().nonzero()[0])]
            raise ModelError(f"{name} feature of row {row} is not finite: extract it again, and look at the weights")
        return padded, squared


def gallery_rows(gallery: Labels, peers: Peers) -> np.ndarray:
    """The gallery rows that this rank reads, int64, possibly none."""
    order = _column_order(gallery)
    starts = _own_starts(len(order), peers)
    return order[starts.start : starts.stop]


def _column_order(gallery: Labels) -> np.ndarray:
    """Gallery rows in the order of the columns: by identity, those of unknown identity last. int64 [G]."""
    order = np.argsort(gallery.identities, kind="stable")
    known = gallery.known[order]
    return np.concatenate([order[known], order[~known]])


def _own_starts(gallery_size: int, peers: Peers) -> range:
    """First columns of this rank's blocks."""
    blocks = -(-gallery_size // GALLERY_BLOCK)
    first, last = (blocks * r // peers.world_size * GALLERY_BLOCK for r in (peers.rank, peers.rank + 1))
    return range(first, min(last, gallery_size), GALLERY_BLOCK)
