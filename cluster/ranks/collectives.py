"""Collectives whose gradients travel back the way the tensors came, on gloo and NCCL alike.

    Team ──▶ [collectives] ──▶ torch.distributed

R = ranks
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Newer versions of torch know them by other names, and warn of these.
_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_gather(tensor: Tensor, group: Any = None) -> Tensor:
    """[n, ...], the same n on every rank -> [R * n, ...]. Its backward sums over ranks what they send back."""
    gathered: Tensor = _AllGather.apply(tensor, group)
    return gathered


def all_to_all(tensor: Tensor, send: Sequence[int], receive: Sequence[int], group: Any = None) -> Tensor:
    """Rows for each rank, `send[r]` of them, -> the `receive[r]` rows from each; the gradients go back."""
    received: Tensor = _AllToAll.apply(tensor, list(send), list(receive), group)
    return received


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        tensor = tensor.contiguous()
        gathered = tensor.new_empty(dist.get_world_size(group) * len(tensor), *tensor.shape[1:])
        _gather_into(gathered, tensor, group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        world_size = dist.get_world_size(ctx.group)
        gradient = gradient.contiguous()
        if dist.get_backend(ctx.group) == "nccl":
            own = gradient.new_empty(len(gradient) // world_size, *gradient.shape[1:])
            _reduce_scatter_into(own, gradient, group=ctx.group)
            return own, None
        parts = torch.empty_like(gradient)  # gloo has no reduce-scatter; in rank order the sum is the same in every run
        dist.all_to_all_single(parts, gradient, group=ctx.group)
        return parts.view(world_size, -1, *gradient.shape[1:]).sum(0), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchanged(tensor, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(gradient, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchanged(tensor: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    received = tensor.new_empty(sum(receive), *tensor.shape[1:])
    dist.all_to_all_single(received, tensor.contiguous(), receive, send, group=group)
    return received
