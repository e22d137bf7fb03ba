"""A state copied into memory of its own, so that training goes on while it is written.

    engine ── tensors ──▶ [take: training waits] ──▶ [arrive: the writer's thread] ──▶ storage

The memory is kept from one checkpoint to the next: fresh pages would cost as much as the copy.
"""

import torch
from torch import Tensor


class HostCopy:
    """Named tensors of one rank as they were at one moment."""

    def __init__(self):
        self._tensors: dict[str, Tensor] = {}
        self._queued: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Replace what is held. On a GPU the copies only queue behind the step: `arrive` waits for them."""
        if self._tensors.keys() != tensors.keys():  # Another stage.
            self._tensors = {}
            self._tensors = {name: _host_memory(tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._tensors[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._queued = torch.cuda.Event(blocking=True)  # Waiting leaves the CPU to training.
            self._queued.record()

    def arrive(self) -> dict[str, Tensor]:
        """All of it, once it is in this machine's memory, where it must not change yet."""
        if self._queued is not None:
            self._queued.synchronize()
        return self._tensors


def _host_memory(tensor: Tensor) -> Tensor:
    """Page-locked for a GPU's tensor, so that the copy need not be waited for."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
