"""The processes that share one computation, as far as the method knows of them.

    one rank's tensors ──▶ [peers] ──▶ those of all ranks ──▶ losses, BatchNorm, retrieval

Everything else in this package computes on the tensors it is handed. Who the peers are, and how a tensor travels,
is the caller's business: in a run they are `cluster.ranks.team.Team`, which fits by its shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """This process's place among those that compute together, and what can cross between them.

    Every rank makes the same calls in the same order.
    """

    @property
    def rank(self) -> int:
        """From 0."""

    @property
    def world_size(self) -> int:
        """R, number of ranks."""

    def all_gather(self, tensor: Tensor, /) -> Tensor:
        """Local [n, ...] of any dtype, the same n on every rank -> [R * n, ...], in rank order.

        For floating tensors it is differentiable, and its backward *sums* over ranks the gradients that arrive for a
        rank's rows. With that, and with parameter gradients averaged over ranks by the caller's engine, the gradient
        is that of the mean over ranks of the losses.
        """

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int], /) -> Tensor:
        """Rows for each rank -> the rows that each rank has for this one, in rank order.

        tensor: [sum(send), ...], `send[r]` rows for rank r after those for the ranks before it. receive: how many rows
        come from each rank; [sum(receive), ...] is returned. Differentiable: the gradients go back the way the rows
        came.
        """

    def all_reduce_sum(self, tensor: Tensor, /) -> Tensor:
        """The sum over ranks, of the tensor's dtype and on its device, without gradient. Alone: the tensor itself."""

    def all_reduce_max(self, tensor: Tensor, /) -> Tensor:
        """The elementwise maximum over ranks, as `all_reduce_sum`."""


@dataclass(frozen=True)
class Alone:
    """A single process."""

    rank: int = 0
    world_size: int = 1

    def all_gather(self, tensor: Tensor, /) -> Tensor:
        return tensor

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int], /) -> Tensor:
        return tensor

    def all_reduce_sum(self, tensor: Tensor, /) -> Tensor:
        return tensor

    def all_reduce_max(self, tensor: Tensor, /) -> Tensor:
        return tensor


ALONE = Alone()


def rank_slice(total: int, rank: int, world_size: int) -> slice:
    """A rank's contiguous part of `total` things; sizes differ by at most one, and are 0 where ranks outnumber them."""
    return slice(total * rank // world_size, total * (rank + 1) // world_size)
