"""Exact retrieval measures from counts over blocks, without the distance matrix (contract C5).

    descriptors of queries and gallery -> products -> ranking -> [retrieve] -> mAP, mINP, CMC, TPR@FPR

For every positive pair only its rank among the query's valid gallery is needed, and that rank is a sum over
blocks of "how many of mine are nearer". Two passes over this rank's blocks: the first reads the distances of
the positives, the second counts. What crosses ranks is summed by the function handed in.

Q, G = query and gallery images, D = feature width, M = most positives that a query has
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipreid.errors import ModelError
from clipreid.peers import ALONE, Peers
from clipreid.retrieval.distance_blocks import GALLERY_BLOCK, QUERY_BLOCK, Products
from clipreid.retrieval.positives import Labels, QueryBlock, count_up, find_near, query_blocks
from clipreid.retrieval.top_k import Nearest, RankedLists
from clipreid.retrieval.tpr_at_fpr import SAFE_RATE, Verification

CMC_RANKS = 50


@dataclass(frozen=True)
class PerQuery:
    """What the measures are means of; NaN and 0 for queries without a positive."""

    AP: np.ndarray
    """float64 [Q], non-interpolated average precision."""
    INP: np.ndarray
    """float64 [Q], positives / rank of the last positive (Ye et al. 2021)."""
    first_rank: np.ndarray
    """int64 [Q], rank of the nearest positive, from 1."""
    positives: np.ndarray
    """int64 [Q], gallery images of the query's identity that the rule leaves."""


@dataclass(frozen=True)
class Retrieval:
    """Means over the valid queries: those with at least one positive that the rule leaves."""

    per_query: PerQuery
    tpr_at_fpr: dict[str, float] | None = None
    """{"1e-4": …, "1e-3": …, "1e-2": …} over all pairs of a query and what the rule leaves of the gallery."""
    nearest: Nearest | None = None

    @property
    def queries(self) -> int:
        return len(self.per_query.AP)

    @property
    def valid_queries(self) -> int:
        return int(self._valid.sum())

    @property
    def mAP(self) -> float:
        return float(self.per_query.AP[self._valid].mean())

    @property
    def mINP(self) -> float:
        return float(self.per_query.INP[self._valid].mean())

    @property
    def cmc(self) -> np.ndarray:
        """float64 [50]: fraction of valid queries with a positive among the nearest 1, 2, …"""
        first = self.per_query.first_rank[self._valid]
        return (first[:, None] <= np.arange(1, CMC_RANKS + 1)).mean(0)

    @property
    def _valid(self) -> np.ndarray:
        return self.per_query.positives > 0

    def metrics(self) -> dict[str, Any]:
        """The figures under the names of metrics.json."""
        cmc = self.cmc
        ranks = {f"R{rank}": float(cmc[rank - 1]) for rank in (1, 5, 10)}
        rates = {"TPR@FPR": self.tpr_at_fpr} if self.tpr_at_fpr else {}
        counts = {"queries": self.queries, "valid_queries": self.valid_queries}
        return {"mAP": self.mAP, "mINP": self.mINP, **ranks, **rates, **counts}


def retrieve(
    query_features: Tensor,
    query: Labels,
    gallery_features: Tensor | np.ndarray,
    gallery: Labels,
    *,
    rule: str = "camera",
    top_k: int = 0,
    peers: Peers = ALONE,
    on_gallery: Callable[[int, int], None] = lambda done, total: None,
) -> Retrieval:
    """Rank the gallery for every query by Euclidean distance; ties go to the image first in the gallery.

    query_features: float [Q, D], the same on every rank; the products run on their device.
    gallery_features: float [G, D], may be memory-mapped: only `gallery_rows(gallery, peers)` are read.
    rule: the gallery images of the query's identity that do not count for it: those of its camera, none, or
    those of its camera and time. top_k: length of the lists of nearest images; 0: none.
    on_gallery is told how many gallery images this rank has compared, and of how many.
    Raises ModelError for an unknown rule, a feature that is not finite, and where no query is valid.
    """
    products = Products(query_features, query, gallery_features, gallery, rule, peers)
    blocks = products.queries
    _check_some_positive(sum(len(block.distances) for block in blocks), len(query.identities), rule)
    products.each(lambda number, start, distances: blocks[number].read(distances, start), only_met=True)
    _share([block.distances for block in blocks], peers)
    for block in blocks:
        block.all_read()

    positives, negatives = _pairs(products)
    farthest = products.sample_distance(SAFE_RATE)
    verification = Verification(positives, negatives, farthest)
    lists = RankedLists(blocks, top_k) if top_k else None

    def count(number: int, start: int, distances: Tensor) -> None:
        block, squared = blocks[number], products.squared[number]
        block.leave_out(distances, start)
        near = find_near(distances, torch.maximum(block.reach, verification.reach(squared)))
        block.count(distances, near, start, products.rows)
        verification.add(near, squared)
        if lists:
            lists.add(number, distances, products.rows[start : start + distances.shape[1]])

    products.each(count, on_gallery=on_gallery)
    _share([block.nearer for block in blocks], peers)
    rates = _rates(products, verification, positives)
    nearest = lists.merged(products.squared, peers) if lists else None
    measured = np.empty((4, len(query.identities)))
    for block in blocks:
        measured[:, block.rows] = _measure(block)
    return Retrieval(_per_query(measured), rates, nearest)


def retrieve_by_distance(distances: Tensor, query: Labels, gallery: Labels, *, rule: str = "camera") -> Retrieval:
    """The same from a given matrix, float32 [Q, G], for distances that are no products (re-ranking)."""
    starts = range(0, len(distances), QUERY_BLOCK)
    parts = ((slice(start, start + QUERY_BLOCK), distances[start : start + QUERY_BLOCK].clone()) for start in starts)
    return retrieve_by_blocks(parts, query, gallery, rule=rule, device=distances.device)


def retrieve_by_blocks(
    blocks: Iterable[tuple[slice, Tensor]],
    query: Labels,
    gallery: Labels,
    *,
    rule: str = "camera",
    device: torch.device | None = None,
    peers: Peers = ALONE,
) -> Retrieval:
    """The same from (queries, their distances float32 [b, G]), a block at a time; each query once, on any rank.

    The blocks are used up: what the rule takes out is set to infinity.
    """
    columns = torch.arange(len(gallery.identities), device=device)
    total = len(query.identities)
    measured = torch.zeros(4, total, dtype=torch.float64, device=device)
    for rows, distances in blocks:
        (block,) = query_blocks(query, gallery, rule, distances.device, [np.arange(total)[rows]])
        block.read(distances, 0)
        block.all_read()
        for start in range(0, len(columns), GALLERY_BLOCK):
            part = distances[:, start : start + GALLERY_BLOCK]
            block.leave_out(part, start)
            block.count(part, find_near(part, block.reach), start, columns)
        measured[:, rows] = torch.from_numpy(_measure(block)).to(device)
    measured = peers.all_reduce_sum(measured).cpu().numpy()
    _check_some_positive(int(measured[3].sum()), total, rule)
    return Retrieval(_per_query(measured))


def _share(tensors: list[Tensor], peers: Peers) -> None:
    """Replace tensors by their sums over ranks, in one exchange."""
    summed = peers.all_reduce_sum(torch.cat([own.flatten() for own in tensors]))
    for own, total in zip(tensors, summed.split([own.numel() for own in tensors]), strict=True):
        own.copy_(total.view_as(own))


def _check_some_positive(positives: int, queries: int, rule: str) -> None:
    if not positives:
        raise ModelError(
            f"none of {queries} queries has a gallery image of its identity that rule {rule!r} leaves: "
            "check the splits, or use another rule."
        )


def _pairs(products: Products) -> tuple[Tensor, int]:
    """Distances of all positives, float32 [P], and the number of all negatives."""
    positives, negatives = [], 0
    for block, squared in zip(products.queries, products.squared, strict=True):
        positives.append(block.distances + squared[block.positives.row])
        negatives += len(block.rows) * len(products.rows) - len(block.distances) - len(block.ignored.row)
    return torch.cat(positives), negatives


def _rates(products: Products, verification: Verification, positives: Tensor) -> dict[str, float]:
    """TPR@FPR; where the sample was misleading, from another pass over all pairs."""
    counts = products.peers.all_reduce_sum(verification.counts())
    if not verification.suffices(counts):
        verification = Verification(positives, verification.negatives, positives.max())

        def count(number: int, start: int, distances: Tensor) -> None:
            products.queries[number].leave_out(distances, start)
            squared = products.squared[number]
            verification.add(find_near(distances, verification.reach(squared)), squared)

        products.each(count)
        counts = products.peers.all_reduce_sum(verification.counts())
    return verification.rates(counts)


def _measure(block: QueryBlock) -> np.ndarray:
    """From the ranks alone: AP, INP, first rank and number of positives of each query, float64 [4, b]."""
    row, rank = block.ranks()
    number = np.bincount(row, minlength=len(block.rows))
    precision = np.bincount(row, (count_up(number) + 1) / rank, minlength=len(number))
    some = np.flatnonzero(number)
    last = number[some].cumsum() - 1
    measured = np.array([np.full(len(number), np.nan)] * 2 + [np.zeros(len(number))] * 2)
    first_rank = rank[last - number[some] + 1]
    measured[:, some] = precision[some] / number[some], number[some] / rank[last], first_rank, number[some]
    return measured


def _per_query(measured: np.ndarray) -> PerQuery:
    AP, INP, first_rank, positives = measured
    return PerQuery(AP, INP, first_rank.astype(np.int64), positives.astype(np.int64))
