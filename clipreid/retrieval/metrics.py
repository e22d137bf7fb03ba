"""Exact retrieval measures from counts over blocks, without the distance matrix.

    descriptors of queries and gallery ──▶ distance_blocks ──▶ positives ──▶ [metrics] ──▶ mAP, mINP, CMC, TPR@FPR

For every positive pair only its rank among the query's valid gallery is needed, and that rank is a sum over blocks of
"how many of mine are nearer". Two passes over this rank's blocks: the first reads the distances of the positives, the
second counts. What the ranks have found is summed.

Q, G = query and gallery images, D = feature width
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipreid.errors import ModelError
from clipreid.peers import ALONE, Peers
from clipreid.retrieval.distance_blocks import GALLERY_BLOCK, QUERY_BLOCK, DistanceBlocks, FeatureRows
from clipreid.retrieval.positives import Labels, Near, PositiveDistances, PositiveRanks, count_up, query_blocks
from clipreid.retrieval.progress import Progress, unreported
from clipreid.retrieval.rules import Rule
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
    """{"1e-4": …, "1e-3": …, "1e-2": …} over all pairs of a query and what the rule leaves of the gallery, both of
    known identity; None where all these are of one identity, so that there is nothing to accept wrongly."""
    nearest: Nearest | None = None
    unknown: int = 0
    """Queries and gallery images of unknown identity."""

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
        fractions: np.ndarray = (first[:, None] <= np.arange(1, CMC_RANKS + 1)).mean(0)
        return fractions

    @property
    def _valid(self) -> np.ndarray:
        return self.per_query.positives > 0

    def metrics(self) -> dict[str, Any]:
        """The figures under the names of metrics.json."""
        cmc = self.cmc
        ranks = {f"R{rank}": float(cmc[rank - 1]) for rank in (1, 5, 10)}
        rates = {"TPR@FPR": self.tpr_at_fpr} if self.tpr_at_fpr else {}
        counts = {"queries": self.queries, "valid_queries": self.valid_queries}
        unknown = {"unknown_identity": self.unknown} if self.unknown else {}
        return {"mAP": self.mAP, "mINP": self.mINP, **ranks, **rates, **counts, **unknown}


def retrieve(
    query_features: Tensor,
    query: Labels,
    gallery_features: Tensor | FeatureRows,
    gallery: Labels,
    *,
    rule: Rule,
    top_k: int = 0,
    peers: Peers = ALONE,
    progress: Progress = unreported,
) -> Retrieval:
    """Rank the gallery for every query by Euclidean distance; ties go to the image first in the gallery.

    query_features: float [Q, D], the same on every rank; the distances are computed on their device.
    gallery_features: float [G, D], may be memory-mapped: only `gallery_rows(gallery, peers)` are read.
    top_k: length of the lists of nearest images; 0: none. progress: in gallery images.
    Raises ModelError when the rule is unknown, a feature is not finite, or no query is valid.
    """
    blocks = DistanceBlocks(query_features, query, gallery_features, gallery, rule, peers)
    found = [PositiveDistances(block) for block in blocks.queries]
    _check_some_positive(sum(len(each.distances) for each in found), query, gallery, rule)
    blocks.each(lambda number, start, distances: found[number].read(distances, start), only_met=True)
    _sum_over_ranks([each.distances for each in found], peers)
    ranks = [each.complete() for each in found]

    positives, negatives = _pairs(blocks, ranks)
    verification = Verification(positives, negatives, blocks.sample_distance(SAFE_RATE))
    lists = RankedLists(blocks.queries, top_k, blocks.device) if top_k else None

    def count(number: int, start: int, distances: Tensor) -> None:
        squared = blocks.squared[number]
        reach = torch.maximum(ranks[number].reach, verification.reach(squared))
        near = ranks[number].find_near(distances, start, reach)
        ranks[number].count(distances, near, start, blocks.rows)
        _verify(verification, blocks, ranks[number], number, start, distances, near)
        if lists:
            lists.add(number, distances, blocks.rows[start : start + distances.shape[1]])

    blocks.each(count, progress=progress)
    _sum_over_ranks([each.nearer for each in ranks], peers)
    rates = _rates(blocks, ranks, verification, positives) if negatives else None
    nearest = lists.merged(blocks.squared, peers) if lists else None
    measures = np.empty((4, len(query.identities)))
    for each in ranks:
        measures[:, each.rows] = _measures(each)
    return Retrieval(_per_query(measures), rates, nearest, _count_unknown(query, gallery))


def retrieve_by_distance(distances: Tensor, query: Labels, gallery: Labels, *, rule: Rule) -> Retrieval:
    """The same from a given matrix, float32 [Q, G], of distances of any kind (re-ranking)."""
    starts = range(0, len(distances), QUERY_BLOCK)
    blocks = ((slice(start, start + QUERY_BLOCK), distances[start : start + QUERY_BLOCK].clone()) for start in starts)
    return retrieve_by_blocks(blocks, query, gallery, rule=rule, device=distances.device)


def retrieve_by_blocks(
    blocks: Iterable[tuple[slice, Tensor]],
    query: Labels,
    gallery: Labels,
    *,
    rule: Rule,
    device: torch.device | None = None,
    peers: Peers = ALONE,
) -> Retrieval:
    """The same from (queries, their distances float32 [b, G]), a block at a time; each query once, on any rank.

    The blocks are used up: what the rule takes out is set to infinity.
    """
    columns = torch.arange(len(gallery.identities), device=device)
    total = len(query.identities)
    measures = torch.zeros(4, total, dtype=torch.float64, device=device)
    for rows, distances in blocks:
        (block,) = query_blocks(query, gallery, rule, distances.device, [np.arange(total)[rows]])
        found = PositiveDistances(block)
        found.read(distances, 0)
        ranks = found.complete()
        for start in range(0, len(columns), GALLERY_BLOCK):
            some = distances[:, start : start + GALLERY_BLOCK]
            ranks.count(some, ranks.find_near(some, start, ranks.reach), start, columns)
        measures[:, rows] = torch.from_numpy(_measures(ranks)).to(device)
    summed = peers.all_reduce_sum(measures).cpu().numpy()
    _check_some_positive(int(summed[3].sum()), query, gallery, rule)
    return Retrieval(_per_query(summed), unknown=_count_unknown(query, gallery))


def _sum_over_ranks(tensors: list[Tensor], peers: Peers) -> None:
    """Replace tensors by their sums over ranks, in one exchange."""
    summed = peers.all_reduce_sum(torch.cat([own.flatten() for own in tensors]))
    for own, total in zip(tensors, summed.split([own.numel() for own in tensors]), strict=True):
        own.copy_(total.view_as(own))


def _check_some_positive(positives: int, query: Labels, gallery: Labels, rule: Rule) -> None:
    if positives:
        return
    for name, labels in (("queries", query), ("gallery images", gallery)):
        if len(labels.known) and not labels.known.any():
            raise ModelError(
                f"nothing to evaluate: none of {len(labels.known)} {name} has a known identity (empty or -1 is "
                "unknown); give the images their identities."
            )
    raise ModelError(
        f"nothing to evaluate: none of {len(query.known)} queries has a gallery image of its identity that rule "
        f"{rule!r} leaves: check the splits, or use another rule."
    )


def _count_unknown(*sides: Labels) -> int:
    return sum(int((~labels.known).sum()) for labels in sides)


def _pairs(blocks: DistanceBlocks, ranks: Sequence[PositiveRanks]) -> tuple[Tensor, int]:
    """Distances of all positives, float32, and the number of all negatives: pairs known to be of two identities."""
    positives, negatives = [], 0
    known = blocks.labels[0].known
    for each, squared in zip(ranks, blocks.squared, strict=True):
        positives.append(each.distances + squared[each.positives.row])
        pairs = int(known[each.rows].sum()) * blocks.num_known
        negatives += pairs - len(each.distances) - len(each.block.ignored.row)
    return torch.cat(positives), negatives


def _rates(
    blocks: DistanceBlocks, ranks: Sequence[PositiveRanks], verification: Verification, positives: Tensor
) -> dict[str, float]:
    """TPR@FPR; where the sample was misleading, from another pass over all pairs."""
    counts = blocks.peers.all_reduce_sum(verification.counts())
    if not verification.suffices(counts):
        verification = Verification(positives, verification.negatives, positives.max())

        def count(number: int, start: int, distances: Tensor) -> None:
            _verify(verification, blocks, ranks[number], number, start, distances)

        blocks.each(count)
        counts = blocks.peers.all_reduce_sum(verification.counts())
    return verification.rates(counts)


def _verify(
    verification: Verification,
    blocks: DistanceBlocks,
    ranks: PositiveRanks,
    number: int,
    start: int,
    distances: Tensor,
    near: Near | None = None,
) -> None:
    """Count a block for TPR@FPR, but no pair with an unknown identity: it may be of one identity or of two.

    near: of the whole block, with a reach of at least the verification's; found here where it is not given.
    """
    squared = blocks.squared[number]
    of_known = distances[:, : max(blocks.num_known - start, 0)]
    if not of_known.numel():
        return
    if near is None or of_known.shape != distances.shape:
        near = ranks.find_near(of_known, start, verification.reach(squared))
    known = torch.from_numpy(blocks.labels[0].known[ranks.rows]).to(squared.device)
    verification.add(near, squared.where(known, torch.inf))


def _measures(ranks: PositiveRanks) -> np.ndarray:
    """From the ranks alone: AP, INP, first rank and number of positives of each query, float64 [4, b]."""
    row, rank = ranks.ranks()
    number = np.bincount(row, minlength=len(ranks.rows))
    precision = np.bincount(row, (count_up(number) + 1) / rank, minlength=len(number))
    some = np.flatnonzero(number)
    last = number[some].cumsum() - 1
    measures = np.array([np.full(len(number), np.nan)] * 2 + [np.zeros(len(number))] * 2)
    first_rank = rank[last - number[some] + 1]
    measures[:, some] = precision[some] / number[some], number[some] / rank[last], first_rank, number[some]
    return measures


def _per_query(measures: np.ndarray) -> PerQuery:
    AP, INP, first_rank, positives = measures
    return PerQuery(AP, INP, first_rank.astype(np.int64), positives.astype(np.int64))
