"""Batches larger than memory: features of a batch, a few images at a time, with the gradient of the whole batch.

    images ──▶ [in_pieces: encoder without graph] ──▶ features ──▶ losses of the whole batch
    parameters' gradients ◀── [in_pieces: encoder again, piece by piece] ◀── features' gradients

The losses need the features of all images, but not their graphs: the first pass keeps features alone, and the backward
pass computes each piece anew with its graph (the gradient cache of Gao et al. 2021). Exact for an encoder that treats
each image by itself; one with BatchNorm would see the statistics of pieces.

b = images of this rank
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Encode = Callable[..., Sequence[Tensor]]


def in_pieces(
    encode: Encode, inputs: Sequence[Tensor | None], parameters: Sequence[Tensor], size: int
) -> tuple[Tensor, ...]:
    """What encode(*inputs) gives, [b, *] each, computed for `size` images at a time.

    encode: a pure function of its inputs, [b, ...] each or None, and of `parameters`, which get gradients.
    """
    context = torch.is_autocast_enabled(device := _device_type(inputs)), torch.get_autocast_dtype(device)
    features: tuple[Tensor, ...] = _InPieces.apply(encode, inputs, size, context, *parameters)
    return features


def _device_type(inputs: Sequence[Tensor | None]) -> str:
    return next(value for value in inputs if value is not None).device.type


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        encode: Encode,
        inputs: Sequence[Tensor | None],
        size: int,
        autocast: tuple[bool, torch.dtype],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.encode, ctx.inputs, ctx.size, ctx.autocast, ctx.parameters = encode, inputs, size, autocast, parameters
        return tuple(map(torch.cat, zip(*(encode(*piece) for piece in _pieces(inputs, size)), strict=True)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        enabled, dtype = ctx.autocast
        for piece, slopes in zip(_pieces(ctx.inputs, ctx.size), _pieces(gradients, ctx.size), strict=True):
            with torch.enable_grad(), torch.autocast(_device_type(ctx.inputs), dtype, enabled=enabled):
                features = ctx.encode(*piece)
            own = torch.autograd.grad(features, ctx.parameters, slopes, allow_unused=True)
            sums = [_added(total, gradient) for total, gradient in zip(sums, own, strict=True)]
        return None, None, None, None, *sums


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if total is None or gradient is None:
        return gradient if total is None else total
    return total.add_(gradient)


def _pieces(tensors: Sequence[Tensor | None], size: int) -> list[tuple[Tensor | None, ...]]:
    count = next(len(tensor) for tensor in tensors if tensor is not None)
    starts = range(0, count, size)
    return [tuple(t if t is None else t[start : start + size] for t in tensors) for start in starts]
