"""Choose the identities and images of every identity-balanced (PK) batch of an epoch.

    build ──▶ index ──▶ [pk_sampler] ──▶ PK loader ──▶ stage 2

In:  the labels (and cameras, shards) of the training split, but no pixels.
Out: int64 [steps, P, K], row numbers of the split: P identities a batch, K images each.

A plan depends on the dataset, the settings and the epoch alone, so every rank computes the same one and takes its
part of every batch, on any number of ranks; state is (epoch, epoch_step). How identities are drawn and images are cut
into groups of K is in `pk_draws.py`.
"""

import heapq
from dataclasses import dataclass
from functools import partial

import numpy as np

from shards.errors import DataError
from shards.loading.index import SplitIndex, first_places
from shards.loading.pk_draws import (
    Cut,
    Images,
    camera_groups,
    draw_until_used,
    draw_weighted,
    identity_groups,
    num_groups,
    starts_of,
)

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
    """One of STRATEGIES.

    identity: as published. camera_aware: as published, but the images of an identity are cut into groups that
    hold as many of its cameras as they can; what is left over comes from the cameras with the most images, so chances
    are even between an identity's cameras, and not between its images. balanced: a batch draws identities with
    probability proportional to (their images) ** balance_alpha, each goes through its images again and again, and an
    epoch has as many batches as the dataset has full ones.
    """
    balance_alpha: float = 0.5
    virtual_nodes: int = 0
    """V: each fills its P / V identities of every batch from its own shards of the epoch; 0: no locality."""


def epoch_plan(split: SplitIndex, settings: PKSettings, epoch: int) -> np.ndarray:
    """All batches of one epoch, int64 [steps, P, K]: row numbers of `split`. Epochs count from 1.

    The rule of CLIP-ReID's released code: every identity's images are shuffled and cut into groups of K; one with
    fewer than K is sampled with replacement to K; a remainder is dropped. P identities are drawn without replacement
    among those with groups left, until fewer than P are left.

    With virtual nodes, the training shards are dealt to them anew, each follows that rule with P / V identities
    and its own shards, and the epoch ends with the first node that can't fill its part. Node v has identities
    v*P/V ... (v+1)*P/V of every batch.

    Raises DataError when the split or a virtual node has fewer identities than its part of a batch.
    """
    check_settings(split, settings)
    nodes = settings.virtual_nodes
    if not nodes:
        return _plan(split, np.arange(len(split)), settings, settings.identities, _generator(settings, epoch))
    node_of_shard = _deal_shards(split, settings, _generator(settings, epoch, nodes))
    share, parts = settings.identities // nodes, []
    for node in range(nodes):
        rows = np.flatnonzero(node_of_shard[split.shard] == node)
        parts.append(_plan(split, rows, settings, share, _generator(settings, epoch, node)))
        if not len(parts[-1]):
            raise DataError(
                f"data.virtual_nodes: in epoch {epoch} a virtual node got {len(np.unique(split.labels[rows]))} "
                f"identities, but has to give {share} to every batch; use fewer virtual nodes, or smaller shards "
                "(pack with a lower --shard-mb)"
            )
    steps = min(map(len, parts))
    return np.concatenate([part[:steps] for part in parts], axis=1)


def rank_part(plan: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The whole identities of each batch that one rank holds: a view [steps, P / world_size, K].

    Raises DataError when the ranks can't hold equal numbers of identities.
    """
    _check_ranks(plan.shape[1], world_size)
    share = plan.shape[1] // world_size
    return plan[:, rank * share : (rank + 1) * share]


def shards_needed(split: SplitIndex, part: np.ndarray) -> list[int]:
    """The shards that hold the rows of a part of a plan, in the order in which they are first needed."""
    first = first_places(split.shard[part.reshape(-1)], len(split.shard_names))
    needed = np.flatnonzero(first >= 0)
    return needed[np.argsort(first[needed])].tolist()


def check_settings(split: SplitIndex, settings: PKSettings, world_size: int = 1) -> None:
    """Raises DataError for what can never work with this dataset and number of ranks."""
    name, nodes = split.index.name, settings.virtual_nodes
    if settings.strategy not in STRATEGIES:
        raise DataError(f"data.sampler is {settings.strategy!r}; known: {', '.join(STRATEGIES)}")
    if (split.labels < 0).any():
        raise DataError(
            f"{name}: {int((split.labels < 0).sum())} images of split {split.name} have no label: pack it again, each "
            "training image with its identity"
        )
    if split.num_identities < settings.identities:
        raise DataError(
            f"stage2.identities: {settings.identities} identities per batch, but {name} has {split.num_identities} "
            f"in {split.name}; set stage2.identities to at most {split.num_identities}"
        )
    if settings.strategy == "camera_aware" and (split.cameras < 0).all():
        raise DataError(f"data.sampler: camera_aware, but {name} knows no cameras; use identity or balanced")
    _check_ranks(settings.identities, world_size)
    if nodes and settings.identities % nodes:
        raise DataError(
            f"stage2.identities: {settings.identities} identities per batch can't be split over {nodes} virtual "
            f"nodes; make it a multiple of data.virtual_nodes"
        )
    if nodes and (shards := np.count_nonzero(np.bincount(split.shard))) < nodes:
        raise DataError(
            f"data.virtual_nodes: {nodes}, but {name} has {shards} training shards; use at most {shards}, or smaller "
            "shards (pack with a lower --shard-mb)"
        )


def _check_ranks(num_identities: int, world_size: int) -> None:
    if num_identities % world_size:
        fits = [str(n) for n in range(1, num_identities + 1) if num_identities % n == 0]
        raise DataError(
            f"stage2.identities: {num_identities} identities per batch can't be split over {world_size} workers; "
            f"make it a multiple of {world_size}, or use {' or '.join(fits)} workers"
        )


def _generator(settings: PKSettings, epoch: int, *part: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(epoch, *part)))


def _plan(
    split: SplitIndex, rows: np.ndarray, settings: PKSettings, batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Batches of `batch_size` identities from some rows of the split, ascending; int64 [steps, batch_size, K]."""
    images = Images.of(split.labels, rows)
    groups = num_groups(images.counts, settings.images_per_identity)
    if settings.strategy == "balanced":
        num_steps = int(groups.sum()) // batch_size if len(groups) >= batch_size else 0
        steps = draw_weighted(images.counts**settings.balance_alpha, batch_size, num_steps, rng)
    else:
        steps = draw_until_used(groups.tolist(), batch_size, rng)
    cut: Cut = identity_groups
    if settings.strategy == "camera_aware":
        cut = partial(camera_groups, split.cameras)
    size = settings.images_per_identity
    return _groups_of(steps.reshape(-1), images, size, cut, rng).reshape(*steps.shape, size)


def _groups_of(drawn: np.ndarray, images: Images, size: int, cut: Cut, rng: np.random.Generator) -> np.ndarray:
    """The rows of every drawn identity, int64 [drawn, K]: its next group, and its images are cut anew when it has used
    all of them (`balanced`)."""
    counts = num_groups(images.counts, size)
    cutting, group = np.divmod(_times_before(drawn), counts[drawn])
    found = np.empty((len(drawn), size), np.int64)
    for number in range(int(cutting.max(initial=-1)) + 1):
        places = np.flatnonzero(cutting == number)
        used = np.zeros(len(counts), bool)
        used[drawn[places]] = True
        first = starts_of(counts * used)
        found[places] = cut(images.only(used), size, rng)[first[drawn[places]] + group[places]]
    return found


def _times_before(values: np.ndarray) -> np.ndarray:
    """How often each value came before: [a, b, a, a] -> [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    counts = np.bincount(values)
    times = np.empty_like(values)
    times[order] = np.arange(len(values)) - np.repeat(starts_of(counts), counts)
    return times


def _deal_shards(split: SplitIndex, settings: PKSettings, rng: np.random.Generator) -> np.ndarray:
    """Virtual node of each shard, int64; in random order, each to the node with the fewest groups so far."""
    images = Images.of(split.labels, np.arange(len(split)))
    groups = num_groups(images.counts, settings.images_per_identity)
    load = np.bincount(split.shard[images.rows[images.starts]], weights=groups, minlength=len(split.shard_names))
    node_of_shard = np.full(len(load), -1)
    nodes = [(0.0, node) for node in range(settings.virtual_nodes)]
    for shard in np.argsort(rng.random(len(load)), kind="stable"):
        if load[shard]:
            filled, node = heapq.heappop(nodes)
            node_of_shard[shard] = node
            heapq.heappush(nodes, (filled + load[shard], node))
    return node_of_shard
