"""Exact retrieval measures from counts over blocks, without the distance matrix (contract C5).

    descriptors of queries and gallery -> [retrieve] -> mAP, mINP, CMC

For every positive pair only its rank among the query's valid gallery is needed, and that rank is a sum over
blocks of "how many of mine are nearer". Two passes over this rank's blocks: the first reads the distances of
the positives, the second counts. What crosses ranks is summed by the function handed in.

Distances come from products of one fixed, padded shape that is aligned to the gallery, so that the value of
a pair does not depend on the number of ranks, and equal rows get equal values.

Q, G = query and gallery images, D = feature width, M = most positives that a query has
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clipreid.errors import ModelError

RULES = {"camera": (("cameras", -1),), "none": (), "camera_time": (("cameras", -1), ("times", ""))}
"""What has to be equal, and its value for unknown, for a gallery image of the query's identity not to
count."""

QUERY_BLOCK, GALLERY_BLOCK = 512, 1024  # rows of one product
CMC_RANKS = 50
NEVER = torch.iinfo(torch.int64).max  # key of what is farther than everything

ReduceSum = Callable[[Tensor], Tensor]
"""A float32 or int64 tensor on the queries' device -> its sum over ranks."""


@dataclass(frozen=True)
class Labels:
    """What is known of n images, in the order of their features."""

    identities: np.ndarray
    """[n], integers or strings, comparable between queries and gallery."""
    cameras: np.ndarray | None = None
    """int64 [n]; -1 is unknown and equals no camera."""
    times: np.ndarray | None = None
    """Strings [n]; empty is unknown and equals no time."""


@dataclass(frozen=True)
class Retrieval:
    mAP: float
    """Mean over valid queries of the non-interpolated average precision, a fraction."""
    mINP: float
    """Mean over valid queries of positives / rank of the last positive (Ye et al. 2021)."""
    cmc: np.ndarray
    """float64 [50]: fraction of valid queries with a positive among the nearest 1, 2, …"""
    queries: int
    valid_queries: int
    """Queries with at least one positive that the rule leaves; only these are counted."""

    def metrics(self) -> dict[str, float | int]:
        """The figures under the names of metrics.json."""
        ranks = {f"R{rank}": float(self.cmc[rank - 1]) for rank in (1, 5, 10)}
        counts = {"queries": self.queries, "valid_queries": self.valid_queries}
        return {"mAP": self.mAP, "mINP": self.mINP, **ranks, **counts}


def retrieve(
    query_features: Tensor,
    query: Labels,
    gallery_features: Tensor | np.ndarray,
    gallery: Labels,
    *,
    rule: str = "camera",
    part: tuple[int, int] = (0, 1),
    reduce_sum: ReduceSum = lambda x: x,
) -> Retrieval:
    """Rank the gallery for every query by Euclidean distance; ties go to the image first in the gallery.

    query_features: float [Q, D], the same on every rank; the products run on their device.
    gallery_features: float [G, D], may be memory-mapped: only `gallery_rows(G, *part)` are read.
    rule: the gallery images of the query's identity that do not count for it: those of its camera, none, or
    those of its camera and time. part: (rank, world_size).
    Raises ModelError for an unknown rule, a feature that is not finite, and where no query is valid.
    """
    return _retrieve(_Products(query_features, gallery_features, part), query, gallery, rule, reduce_sum)


def retrieve_by_distance(distances: Tensor, query: Labels, gallery: Labels, *, rule: str = "camera") -> Retrieval:
    """The same from a given matrix, float32 [Q, G], for distances that are no products (re-ranking)."""
    return _retrieve(_Matrix(distances), query, gallery, rule, lambda x: x)


def retrieve_by_blocks(
    blocks: Iterable[tuple[slice, Tensor]],
    query: Labels,
    gallery: Labels,
    *,
    rule: str = "camera",
    device: torch.device | None = None,
    reduce_sum: ReduceSum = lambda x: x,
) -> Retrieval:
    """The same from (queries, their distances float32 [b, G]), a block at a time; each query once, on any rank."""
    pairs = _same_identity(query, gallery, rule)
    counted = np.bincount(pairs.query[~pairs.ignored], minlength=len(query.identities))
    positives = torch.zeros(len(counted), counted.max(), dtype=torch.int64, device=device)
    counts = torch.zeros(len(counted), counted.max() + 1, dtype=torch.int64, device=device)
    for rows, distances in blocks:
        block, own = _Matrix(distances), _same_identity(_cut(query, rows), gallery, rule)
        keys = _sorted_keys(_positive_distances(block, own), own, block.num_queries)
        positives[rows] = NEVER
        positives[rows, : keys.shape[1]] = keys
        counts[rows, : keys.shape[1] + 1] = _count_between(block, own, keys)
    return _measures(reduce_sum(positives).cpu(), reduce_sum(counts).cpu(), rule)


def _cut(labels: Labels, rows: slice) -> Labels:
    columns = (labels.identities, labels.cameras, labels.times)
    return Labels(*(None if column is None else column[rows] for column in columns))


def gallery_rows(gallery_size: int, rank: int, world_size: int) -> slice:
    """The gallery rows that a rank reads: whole blocks, contiguous, possibly none."""
    blocks = -(-gallery_size // GALLERY_BLOCK)
    first, last = (blocks * r // world_size * GALLERY_BLOCK for r in (rank, rank + 1))
    return slice(min(first, gallery_size), min(last, gallery_size))


@dataclass(frozen=True)
class _Pairs:
    """All pairs of a query and a gallery image of one identity, by query, then by gallery order."""

    query: np.ndarray
    """Row numbers, int64 [pairs]."""
    gallery: np.ndarray
    ignored: np.ndarray
    """bool [pairs]: the rule takes them out; the others are the positives."""
    by_block: dict[tuple[int, int], np.ndarray]
    """(gallery block, query block) -> the numbers of its pairs; blocks without pairs are absent."""

    def within(self, block: tuple[int, int], ignored: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers of the ignored or of the positive pairs of a block, and their rows and columns in it."""
        numbers = self.by_block.get(block, np.zeros(0, np.int64))
        numbers = numbers[self.ignored[numbers] == ignored]
        return numbers, self.query[numbers] % QUERY_BLOCK, self.gallery[numbers] % GALLERY_BLOCK


def _same_identity(query: Labels, gallery: Labels, rule: str) -> _Pairs:
    order = np.argsort(gallery.identities, kind="stable")
    ordered = gallery.identities[order]
    first = np.searchsorted(ordered, query.identities, side="left")
    counts = np.searchsorted(ordered, query.identities, side="right") - first
    q = np.repeat(np.arange(len(counts)), counts)
    g = order[np.repeat(first, counts) + count_up(counts)]

    blocks = np.stack([g // GALLERY_BLOCK, q // QUERY_BLOCK], axis=1)
    names, number = np.unique(blocks, axis=0, return_inverse=True)
    numbers = np.split(np.argsort(number, kind="stable"), np.bincount(number).cumsum()[:-1])
    by_block = dict(zip(map(tuple, names.tolist()), numbers, strict=False))
    return _Pairs(q, g, _ignored(query, gallery, q, g, rule), by_block)


def count_up(counts: np.ndarray) -> np.ndarray:
    """[2, 0, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)


def _ignored(query: Labels, gallery: Labels, q: np.ndarray, g: np.ndarray, rule: str) -> np.ndarray:
    """Which of the pairs (q, g) of one identity the rule takes out of the query's gallery. bool [pairs]."""
    if rule not in RULES:
        raise ModelError(f"retrieval rule is {rule!r}; known: {', '.join(RULES)}.")
    ignored = np.full(len(q), rule != "none")
    for field, unknown in RULES[rule]:
        ours, theirs = getattr(query, field), getattr(gallery, field)
        if ours is None or theirs is None:
            raise ModelError(f"retrieval rule {rule!r} needs {field}, which are not given; use rule 'none'.")
        ignored &= (ours[q] == theirs[g]) & (ours[q] != unknown)
    return ignored


class _Blocks(Protocol):
    """This rank's blocks of the distance matrix, made one at a time."""

    num_queries: int
    device: torch.device

    def __call__(self, wanted: dict | None = None) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """(gallery block, query block) and its distances, float32 [queries, gallery]; all, or those
        wanted."""
        ...


class _Products:
    """Blocks of |g|² - 2 q·g: |q|² is the same for a whole row and would only cost digits."""

    def __init__(self, query: Tensor, gallery: Tensor | np.ndarray, part: tuple[int, int]):
        self.num_queries = len(query)
        self.device = query.device
        self.gallery = gallery
        self.rows = gallery_rows(len(gallery), *part)
        self.queries = [
            self._load(query, start, QUERY_BLOCK, "query")[0] for start in range(0, len(query), QUERY_BLOCK)
        ]

    def __call__(self, wanted: dict | None = None) -> Iterator[tuple[tuple[int, int], Tensor]]:
        for start in range(self.rows.start, self.rows.stop, GALLERY_BLOCK):
            names = [(start // GALLERY_BLOCK, number) for number in range(len(self.queries))]
            names = [name for name in names if wanted is None or name in wanted]
            if names:
                gallery, squared = self._load(self.gallery, start, GALLERY_BLOCK, "gallery")
                filled = len(self.gallery) - start
                for name in names:
                    product = torch.addmm(squared, self.queries[name[1]], gallery.T, alpha=-2)
                    yield name, product[: self.num_queries - name[1] * QUERY_BLOCK, :filled]

    def _load(self, source: Tensor | np.ndarray, start: int, size: int, name: str) -> tuple[Tensor, Tensor]:
        """Rows from `start`, filled up with zeros to [size, D], and their squared norms [size]."""
        rows = source[start : start + size]
        if isinstance(rows, np.ndarray):
            rows = torch.from_numpy(np.array(rows))  # a copy, since memory maps are read-only
        padded = torch.zeros(size, rows.shape[1], device=self.device)
        padded[: len(rows)] = rows
        squared = padded.square().sum(1)
        if not squared.isfinite().all():
            row = start + int(squared.isfinite().logical_not().nonzero()[0])
            raise ModelError(f"{name} feature of row {row} is not finite: extract the features again.")
        return padded, squared


class _Matrix:
    """Blocks cut out of a whole matrix."""

    def __init__(self, distances: Tensor):
        self.num_queries = len(distances)
        self.device = distances.device
        self.distances = distances

    def __call__(self, wanted: dict | None = None) -> Iterator[tuple[tuple[int, int], Tensor]]:
        for g, columns in enumerate(self.distances.split(GALLERY_BLOCK, dim=1)):
            for q, block in enumerate(columns.split(QUERY_BLOCK)):
                if wanted is None or (g, q) in wanted:
                    yield (g, q), block


def _retrieve(blocks: _Blocks, query: Labels, gallery: Labels, rule: str, reduce_sum: ReduceSum) -> Retrieval:
    pairs = _same_identity(query, gallery, rule)
    distances = reduce_sum(_positive_distances(blocks, pairs))
    positives = _sorted_keys(distances, pairs, blocks.num_queries)
    counts = reduce_sum(_count_between(blocks, pairs, positives))
    return _measures(positives.cpu(), counts.cpu(), rule)


def _positive_distances(blocks: _Blocks, pairs: _Pairs) -> Tensor:
    """This rank's distances of the positive pairs, 0 elsewhere: their sum over ranks is exact. float32
    [pairs]."""
    distances = torch.zeros(len(pairs.query), device=blocks.device)
    for block, product in blocks(pairs.by_block):
        numbers, rows, columns = pairs.within(block, ignored=False)
        distances[numbers] = product[rows, columns]
    return distances


def _sorted_keys(distances: Tensor, pairs: _Pairs, num_queries: int) -> Tensor:
    """The keys of each query's positives, nearest first, filled up with NEVER. int64 [Q, M]."""
    positive = np.flatnonzero(~pairs.ignored)
    counts = np.bincount(pairs.query[positive], minlength=num_queries)
    keys = torch.full((num_queries, max(counts, default=0)), NEVER, device=distances.device)
    gallery = torch.from_numpy(pairs.gallery[positive]).to(distances.device)
    keys[pairs.query[positive], count_up(counts)] = _keys(distances[positive], gallery)
    return keys.sort(1).values


def _keys(distances: Tensor, gallery: Tensor) -> Tensor:
    """int64 that order as (distance, gallery row): the float32's bits made monotone above, the row below."""
    bits = (distances + 0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0: equal distances have equal bits
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32 | gallery


def _count_between(blocks: _Blocks, pairs: _Pairs, positives: Tensor) -> Tensor:
    """How many of this rank's valid gallery lie between a query's positives. int64 [Q, M + 1].

    Column j counts keys from that of positive j - 1 (itself included) to that of positive j (excluded).
    """
    width = positives.shape[1] + 1
    counts = torch.zeros(len(positives), width, dtype=torch.int64, device=blocks.device)
    for block, product in blocks():
        start = block[0] * GALLERY_BLOCK
        keys = _keys(product, torch.arange(start, start + product.shape[1], device=blocks.device))
        _, rows, columns = pairs.within(block, ignored=True)
        keys[rows, columns] = NEVER
        queries = slice(block[1] * QUERY_BLOCK, (block[1] + 1) * QUERY_BLOCK)
        column = torch.searchsorted(positives[queries], keys, right=True)
        place = column + torch.arange(len(keys), device=blocks.device)[:, None] * width
        counts[queries] += place.flatten().bincount(minlength=len(keys) * width).view(-1, width)
    return counts


def _measures(positives: Tensor, counts: Tensor, rule: str) -> Retrieval:
    """From the keys of the positives and the counts between them over all ranks, in float64."""
    found = positives != NEVER
    number = found.sum(1)
    valid = number > 0
    if not valid.any():
        raise ModelError(
            f"none of {len(positives)} queries has a gallery image of its identity that rule {rule!r} leaves: "
            "check the splits, or use another rule."
        )
    found, number = found[valid], number[valid]
    ranks = counts[valid].cumsum(1)[:, :-1] + 1
    nth = torch.arange(1, ranks.shape[1] + 1, dtype=torch.float64)
    precision = (nth / ranks * found).sum(1) / number
    last = ranks.gather(1, number[:, None] - 1).squeeze(1)
    cmc = (ranks[:, :1] <= torch.arange(1, CMC_RANKS + 1)).double().mean(0)
    return Retrieval(
        mAP=float(precision.mean()),
        mINP=float((number / last.double()).mean()),
        cmc=cmc.numpy(),
        queries=len(positives),
        valid_queries=len(number),
    )
