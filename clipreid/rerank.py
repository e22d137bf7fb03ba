"""k-reciprocal re-ranking (Zhong et al. 2017) without the matrix of all images against all images.

    descriptors of queries and gallery -> [rerank] -> distances [Q, G] -> retrieval

Queries and gallery together are n images. An image's weights on the others are sparse: of each image the
nearest neighbours are kept, products and sets are made for a block of images at a time, and only the result
is a matrix. Everything is at least float32: half precision moves the result by 2e-3.

Q, G = queries and gallery images, n = Q + G, b = images of a block
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipreid.errors import ModelError
from clipreid.losses import widened
from clipreid.retrieval import Labels, count_up, retrieve_by_distance

BLOCK = 256  # images at a time: b x n values are held

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows, columns and weights of a sparse matrix's entries, by row."""


def evaluate_reranked(
    query_features: Tensor,
    query: Labels,
    gallery_features: Tensor,
    gallery: Labels,
    *,
    rule: str = "camera",
    k1: int = 20,
    k2: int = 6,
    lam: float = 0.3,
) -> dict[str, float | int]:
    """mAP, mINP, R1, … of the re-ranked distances, as in metrics.json. Arguments as in retrieve and rerank."""
    distances = rerank(query_features, gallery_features, k1, k2, lam)
    return retrieve_by_distance(distances.float(), query, gallery, rule=rule).metrics()


def rerank(query_features: Tensor, gallery_features: Tensor, k1: int = 20, k2: int = 6, lam: float = 0.3) -> Tensor:
    """lam x original + (1 - lam) x Jaccard distance of the neighbourhoods. float [Q, G], on the CPU.

    query_features: float [Q, D]; gallery_features: float [G, D], on the same device. The original distance
    is the squared Euclidean one, each image's row over all n divided by its maximum.
    Raises ModelError for k1, k2 below 1 and for fewer images than k1 + 1 or k2.
    """
    features = torch.cat([widened(query_features), widened(gallery_features)])
    num_queries, n = len(query_features), len(features)
    if min(k1, k2) < 1 or max(k1 + 1, k2) > n:
        raise ModelError(f"re-ranking with k1 {k1}, k2 {k2} needs 1 <= k1 < {n} images and 1 <= k2 <= {n}: lower them.")
    nearest, largest = _neighbours(features, max(k1 + 1, k2))
    weights = _Sparse.of(_reciprocal_weights(features, nearest, largest, k1), n)
    expanded = _Sparse.of(_averages(weights, nearest[:, :k2].cpu().numpy()), n)
    by_neighbour = expanded.transposed(first=num_queries)

    result = torch.empty(num_queries, n - num_queries, dtype=features.dtype)
    for rows, distances in _distance_blocks(features, num_queries):
        original = (distances / largest[rows, None])[:, num_queries:]
        result[rows] = lam * original.cpu()
        for i in range(rows.start, rows.stop):
            result[i] += (1 - lam) * torch.from_numpy(_jaccard(expanded, by_neighbour, i, n - num_queries))
    return result


def _distance_blocks(features: Tensor, stop: int) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of images 0 … stop - 1 to all images, [b, n] at a time, exactly 0 to themselves."""
    squared = features.square().sum(1)
    for start in range(0, stop, BLOCK):
        rows = slice(start, min(start + BLOCK, stop))
        distances = torch.addmm(squared, features[rows], features.T, alpha=-2).add_(squared[rows, None])
        distances.clamp_(min=0)
        own = torch.arange(start, rows.stop, device=features.device)
        distances[own - start, own] = 0
        yield rows, distances


def _neighbours(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each image's k nearest, itself included, nearest first, int64 [n, k]; and its largest distance [n]."""
    nearest, largest = [], []
    for _, distances in _distance_blocks(features, len(features)):
        nearest.append(distances.topk(k, largest=False).indices)
        largest.append(distances.amax(1))
    return torch.cat(nearest), torch.cat(largest)


def _reciprocal(nearest: Tensor, k: int) -> Tensor:
    """Which of an image's k + 1 nearest have it among theirs. bool [n, k + 1]."""
    near = nearest[:, : k + 1]
    numbers = torch.arange(len(near), device=near.device)
    return torch.cat([(near[near[i]] == i[:, None, None]).any(2) for i in numbers.split(BLOCK)])


def _reciprocal_weights(features: Tensor, nearest: Tensor, largest: Tensor, k1: int) -> Iterator[Entries]:
    """Blocks of rows of exp(-d) over each image's expanded reciprocal set, normalised to sum 1."""
    half = round(k1 / 2)  # half to even, as in the published code
    near, near_half = nearest[:, : k1 + 1], nearest[:, : half + 1]
    mutual, mutual_half = _reciprocal(nearest, k1), _reciprocal(nearest, half)
    n = len(features)
    for i in torch.arange(n, device=features.device).split(BLOCK):
        member = torch.zeros(len(i), n + 1, dtype=torch.bool, device=features.device)  # the last column is waste
        member.scatter_(1, near[i].where(mutual[i], n), True)
        theirs, valid = near_half[near[i]], mutual_half[near[i]]  # [b, k1 + 1, half + 1]
        shared = member.gather(1, theirs.flatten(1)).view_as(theirs) & valid
        joins = mutual[i] & (3 * shared.sum(2) > 2 * valid.sum(2))
        member.scatter_(1, theirs.where(valid & joins[:, :, None], n).flatten(1), True)

        row, column = member[:, :n].nonzero(as_tuple=True)
        distance = _pair_distances(features, i[row], column)
        weight = torch.exp(-distance / largest[i[row]])
        total = torch.zeros(len(i), dtype=weight.dtype, device=weight.device).index_add_(0, row, weight)
        yield i[row].cpu().numpy(), column.cpu().numpy(), (weight / total[row]).cpu().numpy()


def _pair_distances(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances of the given pairs, from differences. [pairs]."""
    pairs = zip(rows.split(8192), columns.split(8192), strict=True)
    return torch.cat([(features[r] - features[c]).square().sum(1) for r, c in pairs])


@dataclass(frozen=True)
class _Sparse:
    """A sparse matrix of n rows, read by row."""

    starts: np.ndarray
    """int64 [n + 1]: row i has the entries starts[i] … starts[i + 1] - 1."""
    columns: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, blocks: Iterable[Entries], n: int) -> "_Sparse":
        rows, columns, weights = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        starts = np.concatenate([[0], np.bincount(rows, minlength=n).cumsum()])
        return cls(starts, columns, weights)

    def take(self, rows: np.ndarray) -> Entries:
        """The entries of the given rows, one after the other; rows are numbered as in `rows`."""
        counts = self.starts[rows + 1] - self.starts[rows]
        at = np.repeat(self.starts[rows], counts) + count_up(counts)
        return np.repeat(np.arange(len(rows)), counts), self.columns[at], self.weights[at]

    def transposed(self, first: int) -> "_Sparse":
        """The matrix without its rows before `first`, read by column."""
        columns, weights = self.columns[self.starts[first] :], self.weights[self.starts[first] :]
        rows = np.repeat(np.arange(len(self.starts) - 1 - first), np.diff(self.starts[first:]))
        order = np.argsort(columns, kind="stable")
        return _Sparse.of([(columns[order], rows[order], weights[order])], len(self.starts) - 1)


def _averages(weights: _Sparse, nearest: np.ndarray) -> Iterator[Entries]:
    """Blocks of rows of each image's weights averaged over its k2 nearest, int64 [n, k2]."""
    n, k2 = nearest.shape
    for start in range(0, n, BLOCK):
        near = nearest[start : start + BLOCK]
        neighbour, columns, values = weights.take(near.flatten())
        summed = np.bincount(neighbour // k2 * n + columns, values, minlength=len(near) * n)
        filled = np.flatnonzero(summed)
        yield start + filled // n, filled % n, (summed[filled] / k2).astype(values.dtype)


def _jaccard(expanded: _Sparse, by_neighbour: _Sparse, query: int, num_gallery: int) -> np.ndarray:
    """1 - |min of weights| / |max of weights| of a query and every gallery image. [G].

    Only images that share a neighbour with the query are visited. Rows sum to 1, so max = 2 - min.
    """
    own = slice(expanded.starts[query], expanded.starts[query + 1])
    neighbour, gallery, weights = by_neighbour.take(expanded.columns[own])
    smaller = np.minimum(weights, expanded.weights[own][neighbour])
    shared = np.bincount(gallery, smaller, minlength=num_gallery)
    return 1 - shared / (2 - shared)
