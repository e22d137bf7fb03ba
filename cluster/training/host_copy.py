"""A state copied into memory of its own, so that training goes on while it is written.

    engine ── tensors ──▶ [take: training waits] ──▶ [arrive, safetensors: the writer's thread] ──▶ storage

The memory is kept from one checkpoint to the next: fresh pages would cost as much as the copy. The file's bytes are
that memory itself, not a second copy of it.
"""

import json
import math
from typing import Any

import torch
from torch import Tensor

from clipreid.weights.file import TYPES


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

    def arrive(self) -> None:
        """Wait until all of it is in this machine's memory."""
        if self._queued is not None:
            self._queued.synchronize()

    def not_finite(self) -> list[str]:
        """Names of tensors that hold NaN or an infinite number."""
        numbers = ((name, t) for name, t in self._tensors.items() if t.is_floating_point() and t.numel())
        return [name for name, t in numbers if not all(math.isfinite(end) for end in t.aminmax())]

    def safetensors(self, metadata: dict[str, str]) -> list[memoryview | bytes]:
        """A safetensors file in chunks: its header, then the tensors' own memory, which must not change yet.

        It has no checksums of its own: the manifest has one of the whole."""
        header: dict[str, Any] = {"__metadata__": metadata}
        chunks: list[memoryview] = []
        end = 0
        # The widest types first, so that every tensor begins at a multiple of its element's size.
        for name, tensor in sorted(self._tensors.items(), key=lambda item: -item[1].element_size()):
            chunks.append(tensor.flatten().view(torch.uint8).numpy().data)
            start, end = end, end + len(chunks[-1])
            header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return [len(text).to_bytes(8, "little") + text, *chunks]


def _host_memory(tensor: Tensor) -> Tensor:
    """Page-locked for a GPU's tensor, so that the copy need not be waited for."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
