"""The workers of a run as one team: rank, device, and the few collectives that the system uses.

Everything that crosses ranks goes through here, with the name of what it is for, so that the watchdog
can say who is missing where. A team is the `Peers` of `clipreid`, which knows nothing of process groups.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather as differentiable_all_gather

from cluster.errors import RankLost, TrainingError
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
        return torch.cat(differentiable_all_gather(tensor.contiguous()))

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """A new tensor: the sum over ranks, without gradient."""
        total = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

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
            parts = differentiable_all_gather(tensor.to(self.team.device).contiguous(), self.team.patient_group)
        return torch.cat(parts).to(tensor.device)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """As `Team.all_reduce_sum`."""
        total = tensor.detach().to(self.team.device, copy=True)
        if self.world_size > 1:
            with self.team.within(self.operation, PATIENCE):
                dist.all_reduce(total, group=self.team.patient_group)
        return total.to(tensor.device)


def join_process_group(timeout_s: float, cpus: int | None = None) -> Team:
    """Make the process group that torchrun's environment describes, or one of a single process.

    Under Ray Train the group exists already and is adopted; one of gloo says that workers have no GPU, though a node's
    may be in sight.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    without_gpu = dist.is_initialized() and dist.get_backend() == "gloo"
    device = torch.device("cpu") if without_gpu else choose_device(local_rank)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return Team(rank, world_size, local_rank, device, cpus)
    watchdog = Watchdog(rank, world_size, timeout_s)
    patient = dist.new_group(timeout=timedelta(seconds=PATIENCE * timeout_s))
    return Team(rank, world_size, local_rank, device, cpus, watchdog, patient)


def leave_process_group(team: Team) -> None:
    """At the end of the process. A thread of the watchdog that is in the store while Python ends would abort it."""
    if team.watchdog is not None:
        team.watchdog.close()
    dist.destroy_process_group()


def choose_device(local_rank: int) -> torch.device:
    """This worker's GPU where there is one, else the CPU. Ray hides the other workers' GPUs, torchrun does not."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
