"""Draw the identity-balanced (PK) batches of an epoch.

    pack -> index -> [sampler] -> loader -> stage 2

In:  the labels (and cameras, shards) of the training split, but no pixels.
Out: int64 [steps, P, K], row numbers of the split: P identities a batch, K images each.

A plan depends on the dataset, the settings and the epoch alone, so every rank computes the same one and takes its
part of every batch, on any number of ranks; state is (epoch, step). Only `Generator.random` is drawn from: numpy
may change what its other methods make of the same bits, and a resumed run would then see other batches.
"""

from dataclasses import dataclass

import numpy as np

from shards.errors import DataError
from shards.index import SplitIndex

STRATEGIES = ("identity", "camera_aware", "balanced")


@dataclass(frozen=True)
class PKSettings:
    """What fixes all batches of a run, beside the dataset."""

    identities: int
    """P, identities in one global batch."""
    images_per_identity: int
    """K."""
    seed: int = 0
    strategy: str = "identity"
    """One of STRATEGIES."""
    balance_alpha: float = 0.5
    """`balanced`: an identity is drawn with probability proportional to (its images) ** alpha."""
    virtual_nodes: int = 0
    """V: each fills its P / V identities of every batch from its own shards of the epoch; 0: no locality."""


def epoch_plan(split: SplitIndex, settings: PKSettings, epoch: int) -> np.ndarray:
    """All batches of one epoch, int64 [steps, P, K]: row numbers of `split`. Epochs count from 1.

    Epoch rule of the released code (METHOD section 4): every identity's images are shuffled and cut into groups of
    K; one with fewer than K is sampled with replacement to K; a remainder is dropped. P identities are drawn
    without replacement among those with groups left, until fewer than P are left.
    Raises DataError when the split has fewer identities than a batch.
    """
    check_identities(split, settings)
    rng = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(epoch,)))
    rows, first, count = _identity_groups(split.labels, settings.images_per_identity, rng)
    identities = _draw(count, settings.identities, rng)
    turn = _occurrence(identities.reshape(-1)).reshape(identities.shape)
    return rows[first[identities] + turn]


def check_identities(split: SplitIndex, settings: PKSettings) -> None:
    if split.num_identities < settings.identities:
        raise DataError(
            f"stage2.identities: {settings.identities} identities per batch, but {split.index.name} has "
            f"{split.num_identities} in {split.name}; set stage2.identities to at most {split.num_identities}"
        )


def rank_part(plan: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The whole identities of each batch that one rank holds: a view [steps, P / world_size, K].

    Raises DataError when the ranks can't hold equal numbers of identities.
    """
    num_identities = plan.shape[1]
    if num_identities % world_size:
        fits = [n for n in range(1, num_identities + 1) if num_identities % n == 0]
        raise DataError(
            f"stage2.identities: {num_identities} identities per batch can't be split over {world_size} workers; "
            f"use a multiple of {world_size}, or one of {fits} workers"
        )
    share = num_identities // world_size
    return plan[:, rank * share : (rank + 1) * share]


def _identity_groups(labels: np.ndarray, group: int, rng: np.random.Generator):
    """Groups of K rows: int64 [groups, K] sorted by identity, the first group and the number of groups of each."""
    order = np.lexsort((rng.random(len(labels)), labels))
    _, start, images = np.unique(labels[order], return_index=True, return_counts=True)
    count = np.maximum(images // group, 1)
    first = np.cumsum(count) - count
    place = np.arange(group) + group * (np.arange(count.sum()) - np.repeat(first, count))[:, None]
    small = images < group
    place[first[small]] = rng.random((small.sum(), group)) * images[small, None]  # with replacement
    return order[np.repeat(start, count)[:, None] + place], first, count


def _draw(count: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `batch` identities without replacement among those with groups left, until fewer are left.

    count: groups of each identity. Returns int64 [steps, batch]. A partial Fisher-Yates shuffle of the identities
    left draws each step exactly uniformly, at a cost that depends on the batch and not on the number of identities.
    """
    left, groups = list(range(len(count))), count.tolist()
    uniform = rng.random((int(count.sum()) // batch, batch)).tolist()
    steps = []
    for numbers in uniform:
        num_left = len(left)
        if num_left < batch:
            break
        for place, number in enumerate(numbers):
            chosen = place + int(number * (num_left - place))
            left[place], left[chosen] = left[chosen], left[place]
        drawn = left[:batch]
        steps.append(drawn)
        for place in range(batch - 1, -1, -1):
            groups[drawn[place]] -= 1
            if not groups[drawn[place]]:
                left[place] = left[-1]
                left.pop()
    return np.array(steps, np.int64).reshape(-1, batch)


def _occurrence(values: np.ndarray) -> np.ndarray:
    """How often each value came before: [a, b, a, a] -> [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    _, start, times = np.unique(values[order], return_index=True, return_counts=True)
    result = np.empty_like(values)
    result[order] = np.arange(len(values)) - np.repeat(start, times)
    return result
