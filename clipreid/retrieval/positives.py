"""How many gallery images are nearer to a query than each of its positives, from blocks of distances.

    blocks of distances ──▶ [PositiveDistances] ──▶ [PositiveRanks] ──▶ ranks of the positives ──▶ metrics

Two passes over the blocks, a type for each. The first reads the distances of the positives. The second counts what is
nearer: of a block only what is nearer than its query's farthest positive matters, which is sorted, as keys of (query,
distance), and the positives are looked up. Where a positive ties with other images, those that come before it in the
gallery are counted one by one.

Q, G = query and gallery images, P = positives of a block's queries; b, w = rows and columns of a block of distances
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipreid.errors import ModelError
from clipreid.retrieval.rules import RULES, UNKNOWN_IDENTITIES, Rule

NEVER = torch.iinfo(torch.int64).max  # behind all keys
FEW = 8  # an eighth of a block is few: sorted by itself, in place of all rows
TIES = 1024  # positives whose ties are counted at a time


@dataclass(frozen=True)
class Labels:
    """What is known of n images, in the order of their features."""

    identities: np.ndarray
    """[n], integers or strings, comparable between queries and gallery; -1 and empty are unknown and equal none."""
    cameras: np.ndarray | None = None
    """int64 [n]; -1 is unknown and equals no camera."""
    times: np.ndarray | None = None
    """Strings [n]; empty is unknown and equals no time."""

    @cached_property
    def known(self) -> np.ndarray:
        """Whose identity is known, bool [n]. A query of unknown identity is not valid, as it has no positive; a gallery
        image of unknown identity is a wrong one for every query."""
        if self.identities.dtype.kind in "iu":
            unknown = np.isin(self.identities, -1)
        else:
            unknown = np.isin(np.char.strip(self.identities.astype(str)), UNKNOWN_IDENTITIES)
        return np.logical_not(unknown)


@dataclass(frozen=True)
class Pairs:
    """Queries and gallery images of one identity, by query."""

    row: Tensor
    """int64 [n], the query's row in the blocks of distances."""
    column: Tensor
    """int64 [n], the gallery image's column."""

    def within(self, start: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which pairs, bool [n], lie in these columns; and their rows and columns, counted from `start`."""
        here = (self.column >= start) & (self.column < start + width)
        return here, self.row[here], self.column[here] - start


@dataclass(frozen=True)
class QueryBlock:
    """Some queries, and which gallery images are of their identities."""

    rows: np.ndarray
    """int64 [b], their numbers among the queries."""
    positives: Pairs
    ignored: Pairs
    """What the rule takes out."""

    @cached_property
    def columns(self) -> range:
        """No image of the queries' identities lies outside."""
        known = torch.cat([self.positives.column, self.ignored.column]).cpu()
        return range(int(known.min()), int(known.max()) + 1) if len(known) else range(0)

    def meets(self, start: int, width: int) -> bool:
        """Whether these columns can hold an image of the queries' identities."""
        return start < self.columns.stop and self.columns.start < start + width


class PositiveDistances:
    """The first pass: how far the positives of a query block are."""

    def __init__(self, block: QueryBlock) -> None:
        self.block = block
        self.distances = torch.zeros_like(block.positives.column, dtype=torch.float32)
        """float32 [P], 0 until a block holds them: so the sum over ranks is complete."""

    def read(self, distances: Tensor, start: int) -> None:
        """Take the positives' distances from a block, float32 [b, w], of the columns from `start`."""
        here, row, column = self.block.positives.within(start, distances.shape[1])
        self.distances[here] = distances[row, column]

    def complete(self) -> "PositiveRanks":
        """The second pass, once the blocks of all ranks have been read."""
        return PositiveRanks(self.block, self.distances)


class Near(NamedTuple):
    """Those distances of a block, without what is ignored, that are below the reach of their row; row by row."""

    row: Tensor
    """int64 [n]."""
    distance: Tensor
    """float32 [n]."""


class PositiveRanks:
    """The second pass: how many images of its query's gallery come before each positive of a query block."""

    def __init__(self, block: QueryBlock, distances: Tensor) -> None:
        """distances: float32 [P] of the block's positives, complete; they are put in order, to be looked up."""
        self.block, self.rows = block, block.rows
        row = block.positives.row
        self._keys, order = query_keys(row, distances).sort()
        self.positives = Pairs(row[order], block.positives.column[order])
        self.distances = distances[order]
        """float32 [P], by query, then nearest first."""
        self.nearer = torch.zeros_like(self.positives.column)
        """int64 [P]: how many of what has been counted come before a positive."""
        farthest = torch.full((len(self.rows),), -torch.inf, device=row.device)
        farthest.scatter_reduce_(0, row, self.distances, "amax")
        self.reach = farthest.nextafter(farthest.new_tensor(torch.inf))
        """float32 [b]: what lies nearer matters."""
        self._starts = torch.arange(len(self.rows), device=row.device) << 32

    def find_near(self, distances: Tensor, start: int, reach: Tensor) -> Near:
        """What is below its row's reach, float32 [b], in a block, float32 [b, w], of the columns from `start`.

        What the rule takes out is put infinitely far away in the block itself.
        """
        if self.block.meets(start, distances.shape[1]):
            _, row, column = self.block.ignored.within(start, distances.shape[1])
            distances[row, column] = torch.inf
        below = distances < reach[:, None]
        if below.device.type == "cpu":
            place = torch.from_numpy(np.flatnonzero(below.numpy()))  # several times as fast as torch on a CPU
        else:
            place = below.flatten().nonzero().squeeze(1)
        return Near(place // distances.shape[1], distances.reshape(-1).index_select(0, place))

    def count(self, distances: Tensor, near: Near, start: int, gallery_rows: Tensor) -> None:
        """Count a block, float32 [b, w], of the columns from `start`.

        near: found in this block, with a reach of at least `self.reach`. gallery_rows: int64 [G], row number in the
        gallery of each column, by which ties are decided.
        """
        keys = near_keys(distances, near)
        place = torch.searchsorted(keys, self._keys)
        self.nearer += place - torch.searchsorted(keys, self._starts)[self.positives.row]
        # At its place is the positive itself, where it is in this block; what is equal there besides is a tie.
        if self.block.meets(start, distances.shape[1]):
            place += self.positives.within(start, distances.shape[1])[0]
        keys = torch.cat([keys, keys.new_tensor([NEVER])])
        for tied in (keys[place] == self._keys).nonzero().squeeze(1).split(TIES):
            equal = distances[self.positives.row[tied]] == self.distances[tied, None]
            before = gallery_rows[start : start + distances.shape[1]] < gallery_rows[self.positives.column[tied], None]
            self.nearer[tied] += (equal & before).sum(1)

    def ranks(self) -> tuple[np.ndarray, np.ndarray]:
        """Row in the block and rank, from 1, of each positive, by row, then by rank. int64 [P]."""
        keys = (self.positives.row << 40 | self.nearer + 1).sort().values.cpu().numpy()
        return keys >> 40, keys & (1 << 40) - 1


def query_blocks(
    query: Labels,
    gallery: Labels,
    rule: Rule,
    device: torch.device,
    groups: Iterable[np.ndarray],
    columns: np.ndarray | None = None,
) -> Iterator[QueryBlock]:
    """A block for each group, int64 [b], of the queries.

    columns: int64 [G], where each gallery image is in the blocks of distances; by default at its row number.
    Raises ModelError when the rule is unknown, or needs labels that are not given.
    """
    order = np.argsort(gallery.identities, kind="stable")
    ordered = gallery.identities[order]
    first = np.searchsorted(ordered, query.identities, side="left")
    counts = np.searchsorted(ordered, query.identities, side="right") - first
    counts[~query.known] = 0

    def on_device(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(device)

    for rows in groups:
        row = np.repeat(np.arange(len(rows)), counts[rows])
        found = order[np.repeat(first[rows], counts[rows]) + count_up(counts[rows])]
        ignored = _ignored(query, gallery, rows[row], found, rule)
        column = found if columns is None else columns[found]
        pairs = [Pairs(on_device(row[chosen]), on_device(column[chosen])) for chosen in (~ignored, ignored)]
        yield QueryBlock(rows, *pairs)


def _ignored(query: Labels, gallery: Labels, q: np.ndarray, g: np.ndarray, rule: Rule) -> np.ndarray:
    """Which of the pairs (q, g) of one identity the rule takes out of the query's gallery. bool [pairs]."""
    if rule not in RULES:
        raise ModelError(f"retrieval rule is {rule!r}; known: {', '.join(RULES)}.")
    ignored = np.full(len(q), rule != "none")
    for name, unknown in RULES[rule].items():
        ours, theirs = getattr(query, name), getattr(gallery, name)
        if ours is None or theirs is None:
            raise ModelError(f"retrieval rule {rule!r} needs {name}, which are not given; use rule 'none'.")
        ignored &= (ours[q] == theirs[g]) & (ours[q] != unknown)
    return ignored


def count_up(counts: np.ndarray) -> np.ndarray:
    """[2, 0, 3] -> [0, 1, 0, 1, 2]."""
    starts = np.repeat(counts.cumsum() - counts, counts)
    counted: np.ndarray = np.arange(counts.sum()) - starts
    return counted


def near_keys(distances: Tensor, near: Near) -> Tensor:
    """Keys of what is near, and perhaps of more. int64, ascending."""
    if len(near.row) * FEW < distances.numel():
        return ascending(query_keys(near.row, near.distance))
    row = torch.arange(len(distances), device=distances.device)
    return query_keys(row[:, None], ascending(distances)).flatten()


def query_keys(rows: Tensor, distances: Tensor) -> Tensor:
    """int64 that order as (row of the query, distance), from row << 32 on."""
    return (rows << 32) + (monotone(distances) + (1 << 31))


def monotone(distances: Tensor) -> Tensor:
    """int64 of 32 bits that order as float32 do."""
    bits = (distances + 0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0: equal distances have equal bits
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def ascending(values: Tensor) -> Tensor:
    """A copy, sorted along the last dimension."""
    if values.device.type != "cpu":
        return values.sort().values
    return torch.from_numpy(np.sort(values.numpy()))  # with vector instructions: ten times as fast as torch on a CPU
