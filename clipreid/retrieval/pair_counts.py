"""How many pairs of a query and a gallery image there are at each distance, of the same and of different identities.

    distance_blocks ──▶ [pair_counts] ──▶ statistics.calibration

Identities are in one of two halves, of which one is to be fitted and the other to be tested with: pairs across them are
left out, and so is what the rule takes out of a query's gallery, and what is of unknown identity.

Q, G = query and gallery images; b, w = rows and columns of a block; C = cameras of queries, K = steps of distance
"""

from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from clipreid.retrieval.distance_blocks import DistanceBlocks
from clipreid.retrieval.progress import Progress, unreported

STEPS = 2048


@dataclass(frozen=True)
class PairCounts:
    """The same on every rank."""

    distances: np.ndarray
    """float64 [K], the middles of the steps. What is farther than the last is counted there."""
    counts: np.ndarray
    """int64 [C, 2 halves, 2: different and same, K]."""
    cameras: np.ndarray
    """int64 [C], ascending; -1 is unknown."""


def count_pairs(blocks: DistanceBlocks, halves: np.ndarray, progress: Progress = unreported) -> PairCounts:
    """halves: the identities of the second half; all other known ones are in the first."""
    query, gallery = blocks.labels
    device = blocks.device
    cameras = np.full(len(query.identities), -1) if query.cameras is None else query.cameras
    names, camera_codes = np.unique(cameras, return_inverse=True)
    limit = 2 * float(torch.stack([squared.max() for squared in blocks.squared]).max().sqrt()) or 1.0
    width = limit / STEPS
    total = torch.zeros(len(names) * 4 * STEPS, dtype=torch.int64, device=device)
    lock = Lock()

    def sides(labels_identities: np.ndarray, known: np.ndarray) -> np.ndarray:
        return np.where(known, np.isin(labels_identities, halves).astype(np.int64), -1)

    _, codes = np.unique(np.concatenate([query.identities, gallery.identities]), return_inverse=True)
    query_codes, gallery_codes = codes[: len(query.identities)], codes[len(query.identities) :][blocks.order]
    query_sides = sides(query.identities, query.known)
    gallery_sides = sides(gallery.identities, gallery.known)[blocks.order]

    def on_device(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(device)

    def count(number: int, start: int, distances: Tensor) -> None:
        block, columns = blocks.queries[number], slice(start, start + distances.shape[1])
        side, camera = on_device(query_sides[block.rows]), on_device(camera_codes[block.rows])
        same = on_device(query_codes[block.rows])[:, None] == on_device(gallery_codes[columns])
        counted = (side[:, None] == on_device(gallery_sides[columns])) & (side >= 0)[:, None]
        _, row, column = block.ignored.within(start, distances.shape[1])
        counted[row, column] = False
        step = ((distances + blocks.squared[number][:, None]).clamp(min=0).sqrt() / width).long().clamp(max=STEPS - 1)
        places = ((camera * 2 + side)[:, None] * 2 + same) * STEPS + step
        found = torch.bincount(places[counted], minlength=len(total))
        with lock:
            total.add_(found)

    blocks.each(count, progress=progress)
    summed = blocks.peers.all_reduce_sum(total).cpu().numpy()
    return PairCounts((np.arange(STEPS) + 0.5) * width, summed.reshape(len(names), 2, 2, STEPS), names)
