"""What a checkpoint is made of: pieces of parameters, by name, that no number of ranks owns.

    Replicated, TrainedTable ── [Piece] ──▶ checkpoint_writer ──▶ files ──▶ [fill] ──▶ the pieces of any other team

A piece is some consecutive elements of one parameter, with Adam's two moments for them. The pieces of all ranks cover
every parameter once; a rank that resumes takes from each file what overlaps with its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = ("value", *MOMENTS)
"""What a checkpoint holds of each trained parameter."""


@dataclass
class Piece:
    """Flat elements start … start + value.numel() of one parameter, which this rank's optimizer owns: live memory."""

    name: str
    start: int
    value: Tensor
    """float32 master copy, flat."""
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Slot(NamedTuple):
    """Memory of this rank that a checkpoint's elements start … start + tensor.numel() of a parameter belong in."""

    start: int
    tensor: Tensor
    """Flat."""

    def overlap(self, start: int, count: int) -> tuple[int, int] | None:
        """First and last element that it has in common with `count` elements from `start`, None without any."""
        first, last = max(self.start, start), min(self.start + self.tensor.numel(), start + count)
        return (first, last) if first < last else None


def slots(pieces: Iterator[Piece]) -> dict[tuple[str, str], list[Slot]]:
    """By parameter and key."""
    places: dict[tuple[str, str], list[Slot]] = {}
    for piece in pieces:
        for key in KEYS:
            places.setdefault((piece.name, key), []).append(Slot(piece.start, getattr(piece, key)))
    return places
