"""The nearest gallery images of each query, kept while blocks of distances pass by.

    distance_blocks ──▶ [top_k] ──▶ the nearest of each query

Q = queries, b = queries of a block, k = length of a list
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipreid.peers import Peers
from clipreid.retrieval.positives import NEVER, QueryBlock, monotone

NONE = -1  # in place of a gallery row


@dataclass(frozen=True)
class Nearest:
    """Ranked lists of what the rule leaves of the gallery, nearest first, ties by gallery order."""

    rows: np.ndarray
    """int64 [Q, k], row numbers of the gallery; -1 where there are no more."""
    distances: np.ndarray
    """float32 [Q, k], Euclidean; infinite where there are no more."""


class RankedLists:
    """The `length` nearest of each query so far, as keys of (distance, gallery row)."""

    def __init__(self, blocks: Sequence[QueryBlock], length: int, device: torch.device) -> None:
        self.blocks, self.length = blocks, length
        self.keys = [torch.full((len(block.rows), length), NEVER, dtype=torch.int64, device=device) for block in blocks]

    def add(self, number: int, distances: Tensor, gallery_rows: Tensor) -> None:
        """A block of |g|² - 2 q·g, float32 [b, w], infinite where it does not count; gallery_rows: int64 [w]."""
        keys = (monotone(distances) << 32 | gallery_rows).where(distances < torch.inf, NEVER)
        self.keys[number] = torch.cat([self.keys[number], keys], 1).topk(self.length, largest=False).values

    def merged(self, squared: Sequence[Tensor], peers: Peers) -> Nearest:
        """Over all ranks. squared: |q|² of each block's queries, float32 [b]."""
        total = sum(len(block.rows) for block in self.blocks)
        rows = np.full((total, self.length), NONE)
        distances = np.full((total, self.length), np.inf, np.float32)
        for block, keys, lengths in zip(self.blocks, self.keys, squared, strict=True):
            of_ranks = keys.new_zeros(peers.world_size, *keys.shape)
            of_ranks[peers.rank] = keys
            keys = torch.cat(list(peers.all_reduce_sum(of_ranks)), 1).topk(self.length, largest=False).values
            found = keys != NEVER
            rows[block.rows] = (keys & 0xFFFFFFFF).where(found, NONE).cpu().numpy()
            euclidean = (_distances(keys) + lengths[:, None]).clamp(min=0).sqrt()
            distances[block.rows] = euclidean.where(found, torch.inf).cpu().numpy()
        return Nearest(rows, distances)


def _distances(keys: Tensor) -> Tensor:
    """The distances in keys, float32."""
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
