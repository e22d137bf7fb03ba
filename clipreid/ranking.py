"""How many gallery images are nearer to a query than each of its positives, from blocks of distances.

    blocks of distances (products, re-ranking) -> [ranking] -> ranks of the positives -> retrieval: mAP, CMC

A block's rows are sorted, and the positives looked up in them: that costs the same whatever the features are
like, and several times less than looking up every distance among the positives. Where a positive ties with
another image, the rows concerned are counted again by (distance, gallery row).

Q, G = queries and gallery images; b, w = rows and columns of a block of distances, M = most positives of a query
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from clipreid.errors import ModelError

RULES = {"camera": (("cameras", -1),), "none": (), "camera_time": (("cameras", -1), ("times", ""))}
"""What has to be equal, and its value for unknown, for a gallery image of the query's identity not to
count."""

ReduceSum = Callable[[Tensor], Tensor]
"""A tensor on the queries' device, float32, float64 or int64 -> its sum over ranks."""

NEVER = torch.iinfo(torch.int64).max  # key of what is farther than everything
NONE = -1  # in place of a gallery image


@dataclass(frozen=True)
class Labels:
    """What is known of n images, in the order of their features."""

    identities: np.ndarray
    """[n], integers or strings, comparable between queries and gallery."""
    cameras: np.ndarray | None = None
    """int64 [n]; -1 is unknown and equals no camera."""
    times: np.ndarray | None = None
    """Strings [n]; empty is unknown and equals no time."""


@dataclass
class QueryBlock:
    """Some queries, their positives, and what has been found out about them. Rows are filled up with NONE."""

    rows: np.ndarray
    """int64 [b], their numbers among the queries."""
    positives: Tensor
    """int64 [b, M], columns of the gallery."""
    ignored: Tensor
    """int64 [b, ...], columns of the query's identity that the rule takes out."""
    distances: Tensor = field(init=False)
    """float32 [b, M] of the positives, 0 until a block holds them; -inf in place of NONE."""
    nearer: Tensor = field(init=False)
    """int64 [b, M]: how many of what has been counted come before a positive."""
    reach: Tensor = field(init=False)
    """float32 [b]: what is farther need not be told apart when a block is sorted."""
    columns: slice = field(init=False)
    """No positive and no ignored image lies outside."""

    def __post_init__(self) -> None:
        self.distances = torch.zeros(self.positives.shape, device=self.positives.device)
        self.distances[self.positives == NONE] = -torch.inf
        self.reach = torch.full((len(self.rows),), torch.inf, device=self.positives.device)
        self.nearer = torch.zeros_like(self.positives)
        known = torch.cat([self.positives, self.ignored], dim=1)
        known = known[known != NONE]
        self.columns = slice(int(known.min()), int(known.max()) + 1) if len(known) else slice(0, 0)

    def meets(self, start: int, stop: int) -> bool:
        """Whether any image of the queries' identities lies in these columns."""
        return start < self.columns.stop and self.columns.start < stop

    def read(self, distances: Tensor, start: int) -> None:
        """Take the positives' distances from a block, float32 [b, w], of the columns from `start`."""
        here = _inside(self.positives, start, distances.shape[1])
        values = distances.gather(1, (self.positives - start).clamp(0, distances.shape[1] - 1))
        self.distances = values.where(here, self.distances)

    def farthest(self) -> Tensor:
        """Just beyond each query's farthest positive, float32 [b]."""
        return self.distances.amax(1).nextafter(torch.tensor(torch.inf, device=self.distances.device))

    def leave_out(self, distances: Tensor, start: int) -> None:
        """Put what is ignored infinitely far away in a block."""
        if self.meets(start, start + distances.shape[1]):
            row, place = _inside(self.ignored, start, distances.shape[1]).nonzero(as_tuple=True)
            distances[row, self.ignored[row, place] - start] = torch.inf

    def count(self, distances: Tensor, start: int, gallery_rows: Tensor) -> Tensor:
        """Count a block, float32 [b, w], of the columns from `start`, without what is ignored.

        gallery_rows: int64 [G], row number in the gallery of each column, by which ties are decided.
        Returns the block with each of its rows sorted, as far as `reach`.
        """
        width = distances.shape[1]
        own = _inside(self.positives, start, width) if self.meets(start, start + width) else 0
        ordered = sort_rows(distances.minimum(self.reach[:, None]))
        nearer = torch.searchsorted(ordered, self.distances)
        # Behind what is nearer come the positive itself, where it is in this block, and then its ties.
        following = nearer + own
        tied = ordered.gather(1, following.clamp(max=width - 1)) == self.distances
        tied &= (following < width) & (self.positives != NONE)
        if tied.any():
            row = tied.any(1).nonzero().squeeze(1)
            keys = sort_rows(to_keys(distances[row], gallery_rows[start : start + width]))
            own_rows = gallery_rows[self.positives[row]]
            nearer[row] = torch.searchsorted(keys, to_keys(self.distances[row], own_rows))
        self.nearer += nearer
        return ordered

    def ranks(self) -> Tensor:
        """The ranks of each query's positives, ascending from 1, filled up with NEVER. int64 [b, M]."""
        return (self.nearer + 1).where(self.positives != NONE, NEVER).sort(1).values


def query_blocks(
    query: Labels,
    gallery: Labels,
    rule: str,
    device: torch.device,
    parts: Iterable[np.ndarray],
    columns: np.ndarray | None = None,
) -> Iterator[QueryBlock]:
    """A block for each part, int64 [b], of the queries.

    columns: int64 [G], where each gallery image is in the blocks of distances; by default at its row number.
    Raises ModelError for an unknown rule, and for one whose labels are not given.
    """
    order = np.argsort(gallery.identities, kind="stable")
    ordered = gallery.identities[order]
    first = np.searchsorted(ordered, query.identities, side="left")
    counts = np.searchsorted(ordered, query.identities, side="right") - first
    for rows in parts:
        row = np.repeat(np.arange(len(rows)), counts[rows])
        found = order[np.repeat(first[rows], counts[rows]) + _count_up(counts[rows])]
        ignored = _ignored(query, gallery, rows[row], found, rule)
        column = found if columns is None else columns[found]
        positives, others = (_padded(row[part], column[part], len(rows)) for part in (~ignored, ignored))
        yield QueryBlock(rows, torch.from_numpy(positives).to(device), torch.from_numpy(others).to(device))


def _ignored(query: Labels, gallery: Labels, q: np.ndarray, g: np.ndarray, rule: str) -> np.ndarray:
    """Which of the pairs (q, g) of one identity the rule takes out of the query's gallery. bool [pairs]."""
    if rule not in RULES:
        raise ModelError(f"retrieval rule is {rule!r}; known: {', '.join(RULES)}.")
    ignored = np.full(len(q), rule != "none")
    for name, unknown in RULES[rule]:
        ours, theirs = getattr(query, name), getattr(gallery, name)
        if ours is None or theirs is None:
            raise ModelError(f"retrieval rule {rule!r} needs {name}, which are not given; use rule 'none'.")
        ignored &= (ours[q] == theirs[g]) & (ours[q] != unknown)
    return ignored


def _padded(rows: np.ndarray, values: np.ndarray, num_rows: int) -> np.ndarray:
    """Values by row, int64 [num_rows, most, at least 1], filled up with NONE. `rows` ascend."""
    counts = np.bincount(rows, minlength=num_rows)
    padded = np.full((num_rows, counts.max(initial=1)), NONE)
    padded[rows, _count_up(counts)] = values
    return padded


def _count_up(counts: np.ndarray) -> np.ndarray:
    """[2, 0, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)


def _inside(columns: Tensor, start: int, width: int) -> Tensor:
    return (columns >= start) & (columns < start + width)


def to_keys(distances: Tensor, gallery_rows: Tensor) -> Tensor:
    """int64 that order as (distance, gallery row): the float32's bits made monotone above, the row below."""
    bits = (distances + 0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0: equal distances have equal bits
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32 | gallery_rows


def sort_rows(values: Tensor) -> Tensor:
    """Sort each row of [b, w], ascending, in place on a CPU."""
    if values.device.type != "cpu":
        return values.sort(1).values
    values.numpy().sort(axis=1)  # ten times as fast as torch on a CPU
    return values
