"""The workers of a run as one team: rank, device, and the few collectives that the system uses.

Everything that crosses ranks goes through here, with the name of what it is for, so that the watchdog
can say who is missing where. `clipreid` is handed `Team.gather` and knows nothing of process groups.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather as differentiable_all_gather


@dataclass
class Team:
    """This worker's place among all workers of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    on_operation: Callable[[str], None] = lambda name: None
    """Told the name of every operation before this rank joins it."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, tensor: Tensor) -> Tensor:
        """Differentiable: local [n, ...], the same n on every rank, to [world_size * n, ...] in rank order.

        Its backward sums what all ranks send back, so with parameter gradients averaged over ranks the
        result is the gradient of the mean of the ranks' losses.
        """
        if self.world_size == 1:
            return tensor
        self.on_operation("gather features")
        return torch.cat(differentiable_all_gather(tensor.contiguous()))

    def sum(self, tensor: Tensor, name: str = "sum") -> Tensor:
        """A new tensor: the sum over ranks, without gradient."""
        total = tensor.detach().clone()
        if self.world_size > 1:
            self.on_operation(name)
            dist.all_reduce(total)
        return total

    def collect(self, value: Any, name: str = "collect") -> list[Any]:
        """Every rank's picklable value, in rank order."""
        if self.world_size == 1:
            return [value]
        self.on_operation(name)
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any, name: str = "broadcast") -> Any:
        """Rank 0's picklable value."""
        if self.world_size == 1:
            return value
        self.on_operation(name)
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self, name: str) -> None:
        """Go on when every rank has come here."""
        if self.world_size > 1:
            self.on_operation(name)
            self.sum(torch.zeros(1, device=self.device), name)


def join_process_group(timeout_s: float) -> Team:
    """Make the process group that torchrun's environment describes, or one of a single process.

    Under Ray Train the group exists already and is adopted.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = choose_device(local_rank)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return Team(dist.get_rank(), dist.get_world_size(), local_rank, device)


def choose_device(local_rank: int) -> torch.device:
    """This worker's GPU where there is one, else the CPU. Ray hides the other workers' GPUs, torchrun does not."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
