"""k-reciprocal re-ranking (Zhong et al. 2017) without the matrix of all images against all images.

    descriptors of queries and gallery ──▶ [rerank] ──▶ distances of a block of queries at a time ──▶ metrics

The nearest of each image give weights on its reciprocal neighbours, and these the distances. Queries and gallery
together are n images. An image's weights on the others are sparse, and everything else is made for a block of images
at a time. The blocks of rows are shared out among ranks; what all ranks need is summed over them, each entry from one
rank and 0 from the others, so the result does not depend on their number. Everything is at least float32: half
precision moves the result by 2e-3.

Q, G = queries and gallery images, n = Q + G, b = images of a block, D = feature width
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipreid.errors import ModelError
from clipreid.losses import at_least_float32
from clipreid.peers import ALONE, Peers
from clipreid.retrieval.distance_blocks import FeatureRows
from clipreid.retrieval.metrics import retrieve_by_blocks
from clipreid.retrieval.positives import Labels
from clipreid.retrieval.progress import Progress, unreported
from clipreid.retrieval.rules import Rule

BLOCK = 512  # rows at a time: b x n distances are held
JACCARD_BLOCK = 32  # queries whose common neighbours are listed at a time
PAIRS = 1024  # pairs whose differences are held: few enough to stay in a processor's cache

Entries = tuple[Tensor, Tensor, Tensor]
"""Rows, columns and weights of a sparse matrix's entries, by row."""


def evaluate_reranked(
    query_features: Tensor,
    query: Labels,
    gallery_features: Tensor | FeatureRows,
    gallery: Labels,
    *,
    rule: Rule,
    k1: int,
    k2: int,
    lam: float,
    peers: Peers = ALONE,
    progress: Progress = unreported,
) -> dict[str, Any]:
    """mAP, mINP, R1, … of the re-ranked distances, as in metrics.json. Arguments as in retrieve and reranked."""
    sides = query_features, gallery_features
    blocks = reranked(*sides, k1, k2, lam, peers=peers, progress=progress)
    float32 = ((rows, distances.float()) for rows, distances in blocks)
    device = query_features.device
    return retrieve_by_blocks(float32, query, gallery, rule=rule, device=device, peers=peers).metrics()


def rerank(query_features: Tensor, gallery_features: Tensor, k1: int, k2: int, lam: float) -> Tensor:
    """The whole matrix of `reranked`, float [Q, G], for few images."""
    return torch.cat([distances for _, distances in reranked(query_features, gallery_features, k1, k2, lam)])


def reranked(
    query_features: Tensor,
    gallery_features: Tensor | FeatureRows,
    k1: int,
    k2: int,
    lam: float,
    *,
    peers: Peers = ALONE,
    progress: Progress = unreported,
) -> Iterator[tuple[slice, Tensor]]:
    """lam x original + (1 - lam) x Jaccard distance of the neighbourhoods: (queries, float [b, G]), a block at a time.

    query_features: float [Q, D], gallery_features: float [G, D], both whole on every rank; the gallery's may be
    memory-mapped. Work is done on the queries' device, where all features are held once more. The original distance
    is the squared Euclidean one, each image's row over all n divided by its maximum.
    The ranks' blocks are all queries, each once. progress: in images that
    were compared with all others: first for their neighbours, then the queries for their distances.
    Raises ModelError when k1 or k2 is below 1, there are fewer images than k1 + 1 or k2, or features are not finite.
    """
    n, num_queries = len(query_features) + len(gallery_features), len(query_features)
    if min(k1, k2) < 1 or max(k1 + 1, k2) > n:
        raise ModelError(f"re-ranking with k1 {k1}, k2 {k2} needs 1 <= k1 < {n} images and 1 <= k2 <= {n}: lower them.")
    features = _all_features(query_features, gallery_features)
    own_rows, own_queries = list(_own_blocks(n, peers)), list(_own_blocks(num_queries, peers))
    done, total = 0, sum(rows.stop - rows.start for rows in own_rows + own_queries)

    def compared(blocks: list[slice]) -> Iterator[tuple[slice, Tensor]]:
        nonlocal done
        for rows, distances in _distances(features, blocks):
            yield rows, distances
            done += len(distances)
            progress(done, total)

    nearest, largest = _neighbours(compared(own_rows), features, max(k1 + 1, k2), peers)
    weights = _Sparse.of(_reciprocal_weights(features, nearest, largest, k1, own_rows), n, features, peers)
    expanded = _Sparse.of(_averages(weights, nearest[:, :k2], own_rows), n, features, peers)
    by_neighbour = expanded.transposed(first=num_queries)
    for rows, distances in compared(own_queries):
        original = distances[:, num_queries:] / largest[rows, None]
        jaccard = _jaccard(expanded, by_neighbour, rows, n - num_queries)
        yield rows, original.mul_(lam).add_(jaccard, alpha=1 - lam)


def _all_features(query: Tensor, gallery: Tensor | FeatureRows) -> Tensor:
    """float32 or float64 [n, D], on the queries' device."""
    features = at_least_float32(query).new_empty(len(query) + len(gallery), query.shape[1])
    features[: len(query)] = query
    for start in range(0, len(gallery), BLOCK):
        rows = gallery[start : start + BLOCK]
        own = features[len(query) + start :][: len(rows)]
        own[:] = torch.from_numpy(np.array(rows)) if isinstance(rows, np.ndarray) else rows  # a map is read-only
    return features


def _own_blocks(stop: int, peers: Peers) -> Iterator[slice]:
    """This rank's share of the rows 0 … stop - 1, cut in the same places for any number of ranks."""
    blocks = -(-stop // BLOCK)
    for block in range(blocks * peers.rank // peers.world_size, blocks * (peers.rank + 1) // peers.world_size):
        yield slice(block * BLOCK, min((block + 1) * BLOCK, stop))


def _distances(features: Tensor, blocks: list[slice]) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of a block of images to all images, [b, n] at a time, exactly 0 to themselves."""
    squared = features.square().sum(1)
    for rows in blocks:
        distances = torch.addmm(squared, features[rows], features.T, alpha=-2).add_(squared[rows, None])
        distances.clamp_(min=0)
        own = torch.arange(rows.start, rows.stop, device=features.device)
        distances[own - rows.start, own] = 0
        yield rows, distances


def _neighbours(
    blocks: Iterable[tuple[slice, Tensor]], features: Tensor, k: int, peers: Peers
) -> tuple[Tensor, Tensor]:
    """Each image's k nearest, itself included, nearest first, int64 [n, k]; and its largest distance [n]."""
    nearest = torch.zeros(len(features), k, dtype=torch.int64, device=features.device)
    largest = features.new_zeros(len(features))
    for rows, distances in blocks:
        nearest[rows] = distances.topk(k, largest=False).indices
        largest[rows] = distances.amax(1)
    nearest, largest = peers.all_reduce_sum(nearest), peers.all_reduce_sum(largest)
    if not largest.isfinite().all():
        raise ModelError("re-ranking: features that are not finite: extract them again, and look at the weights")
    return nearest, largest.clamp_min_(torch.finfo(largest.dtype).tiny)  # 0 where all images are the same


def _mutual(near: Tensor, rows: slice) -> Tensor:
    """Which of the images that are near to an image of the block have it near to them. bool [b, k]."""
    numbers = torch.arange(rows.start, rows.stop, device=near.device)
    return (near[near[rows]] == numbers[:, None, None]).any(2)


def _reciprocal_weights(
    features: Tensor, nearest: Tensor, largest: Tensor, k1: int, own_rows: list[slice]
) -> Iterator[Entries]:
    """Blocks of rows of exp(-d) over each image's expanded reciprocal set, normalised to sum 1."""
    n = len(features)
    half = round(k1 / 2)  # half to even, as in the published code
    near, near_half = nearest[:, : k1 + 1], nearest[:, : half + 1]
    mutual_half = torch.cat([_mutual(near_half, rows) for rows in _own_blocks(n, ALONE)])
    sets_half = near_half.where(mutual_half, n)  # [n, half + 1], n stands for none
    for rows in own_rows:
        mutual = _mutual(near, rows)
        own = near[rows].where(mutual, n).sort(1).values  # [b, k1 + 1]
        theirs = sets_half[near[rows]]  # [b, k1 + 1, half + 1]
        place = torch.searchsorted(own, theirs.flatten(1)).clamp_(max=k1)
        valid = theirs < n
        shared = (own.gather(1, place).view_as(theirs) == theirs) & valid
        joins = mutual & (3 * shared.sum(2) > 2 * valid.sum(2))
        members = torch.cat([own, theirs.where(joins[:, :, None], n).flatten(1)], 1).sort(1).values
        new = members < n
        new[:, 1:] &= members[:, 1:] != members[:, :-1]

        row, column = rows.start + new.nonzero(as_tuple=True)[0], members[new]
        weight = torch.exp(-_pair_distances(features, row, column) / largest[row])
        total = weight.new_zeros(n).index_add_(0, row, weight)
        yield row, column, weight / total[row]


def _pair_distances(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances of the given pairs, from differences. [pairs]."""
    pairs = zip(rows.split(PAIRS), columns.split(PAIRS), strict=True)
    return torch.cat([(features[r] - features[c]).square().sum(1) for r, c in pairs])


@dataclass(frozen=True)
class _Sparse:
    """A sparse matrix of n rows, read by row."""

    starts: Tensor
    """int64 [n + 1]: row i has the entries starts[i] … starts[i + 1] - 1."""
    columns: Tensor
    weights: Tensor

    @classmethod
    def of(cls, blocks: Iterable[Entries], n: int, like: Tensor, peers: Peers) -> "_Sparse":
        """From the blocks of rows of all ranks, each a run of rows; weights of the type and on the device of `like`."""
        none = torch.zeros(0, dtype=torch.int64, device=like.device)
        rows, *own = (torch.cat(parts) for parts in zip((none, none, like.new_zeros(0)), *blocks, strict=True))
        starts = peers.all_reduce_sum(_starts(rows, n))
        first = int(starts[rows[0]]) if len(rows) else 0
        whole = [values.new_zeros(int(starts[-1])) for values in own]
        for values, here in zip(whole, own, strict=True):
            values[first : first + len(here)] = here
        return cls(starts, *map(peers.all_reduce_sum, whole))

    def take(self, rows: Tensor) -> Entries:
        """The entries of the given rows, one after the other; rows are numbered as in `rows`."""
        counts = self.starts[rows + 1] - self.starts[rows]
        row = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        at = torch.arange(len(row), device=rows.device) + (self.starts[rows] - counts.cumsum(0) + counts)[row]
        return row, self.columns[at], self.weights[at]

    def transposed(self, first: int) -> "_Sparse":
        """The matrix without its rows before `first`, read by column; its columns are those rows, from 0."""
        columns, weights = self.columns[self.starts[first] :], self.weights[self.starts[first] :]
        counts = self.starts.diff()[first:]
        rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        columns, order = columns.sort(stable=True)
        return _Sparse(_starts(columns, len(self.starts) - 1), rows[order], weights[order])


def _starts(rows: Tensor, n: int) -> Tensor:
    """Where each of n rows starts among ascending rows. int64 [n + 1]."""
    return torch.searchsorted(rows, torch.arange(n + 1, device=rows.device))


def _averages(weights: _Sparse, nearest: Tensor, own_rows: list[slice]) -> Iterator[Entries]:
    """Blocks of rows of each image's weights averaged over its k2 nearest, int64 [n, k2]."""
    n, k2 = nearest.shape
    for rows in own_rows:
        neighbour, column, values = weights.take(nearest[rows].flatten())
        place, order = ((neighbour // k2 + rows.start) * n + column).sort(stable=True)
        place, number = place.unique_consecutive(return_inverse=True)
        summed = values.new_zeros(len(place)).index_add_(0, number, values[order])
        yield place // n, place % n, summed / k2


def _jaccard(expanded: _Sparse, by_neighbour: _Sparse, rows: slice, num_gallery: int) -> Tensor:
    """1 - |min of weights| / |max of weights| of a block of queries and every gallery image. [b, G].

    Only images that share a neighbour with a query are visited. Rows sum to 1, so max = 2 - min.
    """
    shared = expanded.weights.new_zeros(rows.stop - rows.start, num_gallery)
    numbers = torch.arange(rows.start, rows.stop, device=shared.device)
    for some, sums in zip(numbers.split(JACCARD_BLOCK), shared.split(JACCARD_BLOCK), strict=True):
        query, neighbour, weights = expanded.take(some)
        entry, gallery, others = by_neighbour.take(neighbour)
        place = query[entry] * num_gallery + gallery
        sums.view(-1).index_add_(0, place, torch.minimum(weights[entry], others))
    return shared.div_(2 - shared).neg_().add_(1)
