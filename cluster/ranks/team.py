"""The workers of a run as one team: rank, device, and the few collectives that the system uses.

Everything that crosses ranks goes through here, with the name of what it is for, so that the watchdog
can say who is missing where. A team is the `Peers` of `clipreid`, which knows nothing of process groups.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import RankLost, TrainingError
from cluster.ranks.collectives import all_gather, all_to_all
from cluster.ranks.watchdog import Watchdog

PATIENCE = 10.0
"""Evaluation, extraction and saving may keep ranks waiting this many times longer than a training step."""


@dataclass
class Team:
    """This worker's place among all workers of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cpus: int | None = None
    """CPUs that this worker has for itself and its loaders; None: not known."""
    watchdog: Watchdog | None = None
    patient_group: Any = None
    """The same ranks with a longer timeout."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def within(self, operation: str, patience: float = 1.0) -> Iterator[None]:
        """What this rank does in the block needs all ranks. Raises RankLost in place of a failed collective."""
        if self.watchdog is None:
            yield
            return
        with self.watchdog.during(operation, patience):
            try:
                yield
            except RuntimeError as error:
                if isinstance(error, TrainingError | RankLost | torch.OutOfMemoryError):
                    raise
                raise self.watchdog.explain(error) from error

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Differentiable: local [n, ...], the same n on every rank, to [world_size * n, ...] in rank order.

        Its backward sums what all ranks send back, so with parameter gradients averaged over ranks the
        result is the gradient of the mean of the ranks' losses.
        """
        if self.world_size == 1:
            return tensor
        return all_gather(tensor)

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Differentiable: rows for each rank, `send[r]` of them, to the `receive[r]` rows from each."""
        if self.world_size == 1:
            return tensor
        return all_to_all(tensor, send, receive)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """A new tensor: the sum over ranks, without gradient."""
        total, wait = self.start_all_reduce_sum(tensor)
        wait()
        return total

    def start_all_reduce_sum(self, tensor: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """As `all_reduce_sum`, but this rank goes on: a new tensor, and what waits until it is the sum. On a GPU it is
        the stream that waits."""
        total = tensor.detach().clone()
        if self.world_size == 1:
            return total, lambda: None
        return total, dist.all_reduce(total, async_op=True).wait

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """A new tensor: the elementwise maximum over ranks, without gradient."""
        largest = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest

    def patiently(self, operation: str) -> "PatientTeam":
        """The same ranks for collectives to which they may come far apart; `operation`: what these are for."""
        return PatientTeam(self, operation)

    def all_gather_objects(self, value: Any, operation: str) -> list[Any]:
        """Every rank's picklable value, in rank order."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        with self.within(operation, PATIENCE):
            dist.all_gather_object(values, value, group=self.patient_group)
        return values

    def broadcast_object(self, value: Any, operation: str) -> Any:
        """Rank 0's picklable value."""
        return self.all_gather_objects(value if self.is_first else None, operation)[0]

    def on_first(self, work: Callable[[], Any], operation: str) -> Any:
        """Rank 0's result of `work`. What it raises is raised on every rank."""
        value = error = None
        if self.is_first:
            try:
                value = work()
            except Exception as fault:
                error = fault
        value, error = self.broadcast_object((value, error), operation)
        if error is not None:
            raise error
        return value

    def barrier(self, operation: str) -> None:
        """Go on when every rank has come here."""
        self.all_gather_objects(None, operation)


@dataclass(frozen=True)
class PatientTeam:
    """A team's ranks where they may come far apart, as in an evaluation. Tensors may lie on any device."""

    team: Team
    operation: str

    @property
    def rank(self) -> int:
        return self.team.rank

    @property
    def world_size(self) -> int:
        return self.team.world_size

    def all_gather(self, tensor: Tensor) -> Tensor:
        """As `Team.all_gather`."""
        if self.world_size == 1:
            return tensor
        with self.team.within(self.operation, PATIENCE):
            return all_gather(tensor.to(self.team.device), self.team.patient_group).to(tensor.device)

    def all_to_all(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """As `Team.all_to_all`."""
        if self.world_size == 1:
            return tensor
        with self.team.within(self.operation, PATIENCE):
            return all_to_all(tensor.to(self.team.device), send, receive, self.team.patient_group).to(tensor.device)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """As `Team.all_reduce_sum`."""
        return self._all_reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """As `Team.all_reduce_max`."""
        return self._all_reduce(tensor, dist.ReduceOp.MAX)

    def _all_reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        total = tensor.detach().to(self.team.device, copy=True)
        if self.world_size > 1:
            with self.team.within(self.operation, PATIENCE):
                dist.all_reduce(total, operation, group=self.team.patient_group)
        return total.to(tensor.device)
