"""Bytes that a rank sends, counted at the collectives.

    work ──▶ torch.distributed ──▶ operators of c10d ──▶ [traffic] ──▶ bytes by kind of collective

Whatever calls a collective (losses, backward pass, DeepSpeed, checkpoints), and by which name, it ends in an operator
of torch's c10d. The count is taken there, so that none is missed: one that has no rule here is an error.

R = ranks
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RULES = {
    "all_reduce": "2 (R-1)/R of the tensor (ring)",
    "all_gather": "(R-1) times the rank's own tensor (ring)",
    "reduce_scatter": "(R-1)/R of the tensor (ring)",
    "all_to_all": "the rows for other ranks",
    "broadcast": "(R-1)/R of the tensor, the mean over ranks (chain)",
    "barrier": "nothing",
}
"""What one rank sends for each, in bytes."""


class Traffic(TorchDispatchMode):
    """Counts while the block runs. Every operation passes through here, which takes time: not for timed steps."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(RULES, 0.0)
        """Sent by this rank, by kind."""
        self.calls = dict.fromkeys(RULES, 0)

    @property
    def sent_bytes(self) -> float:
        return sum(self.bytes.values())

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "c10d":
            kind, num_bytes = COUNTS[operator.name().removeprefix("c10d::")](args)
            self.bytes[kind] += num_bytes
            self.calls[kind] += 1
        return operator(*args, **(kwargs or {}))


def _bytes(tensors: Tensor | list[Tensor]) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


def _of(kind: str, which: int, factor: Callable[[int], float]) -> Callable[[Any], tuple[str, float]]:
    """A rule: the bytes of argument number `which`, times a factor that R decides."""
    return lambda args: (kind, _bytes(args[which]) * factor(dist.get_world_size()))


def _all_to_all(args: Any) -> tuple[str, float]:
    _, tensor, _, _, rows = args[:5]
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if not rows:
        return "all_to_all", _bytes(tensor) * (ranks - 1) / ranks
    return "all_to_all", _bytes(tensor) - _bytes(tensor[: rows[rank]])


COUNTS: dict[str, Callable[[Any], tuple[str, float]]] = {
    "allreduce_": _of("all_reduce", 0, lambda ranks: 2 * (ranks - 1) / ranks),
    "allreduce_coalesced_": _of("all_reduce", 0, lambda ranks: 2 * (ranks - 1) / ranks),
    "_allgather_base_": _of("all_gather", 1, lambda ranks: ranks - 1),
    "allgather_": _of("all_gather", 1, lambda ranks: ranks - 1),
    "allgather_into_tensor_coalesced_": _of("all_gather", 1, lambda ranks: ranks - 1),
    "_reduce_scatter_base_": _of("reduce_scatter", 1, lambda ranks: (ranks - 1) / ranks),
    "reduce_scatter_": _of("reduce_scatter", 1, lambda ranks: (ranks - 1) / ranks),
    "alltoall_base_": _all_to_all,
    "broadcast_": _of("broadcast", 0, lambda ranks: (ranks - 1) / ranks),
    "barrier": lambda args: ("barrier", 0.0),
}
"""By operator: the kind, and the bytes that a call with these arguments sends."""


def rules() -> dict[str, str]:
    """For a benchmark's report."""
    return {**RULES, "counted": f"at the operators of c10d, torch {torch.__version__}"}
