"""The one thing that crosses ranks: a function that collects equal parts of a tensor from all of them.

    encoders -> [gather] -> losses

Everything else in this package computes on the tensors it is handed. The caller supplies the function (single
process: `alone`), so that nothing here knows of process groups.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]
"""Local [n, ...] of any dtype, same n on every rank -> [R * n, ...], the parts in rank order.

For floating tensors it is differentiable, and its backward *sums* over ranks the gradients that arrive
for a rank's part. With that, and with parameter gradients averaged over ranks by the caller's engine, the
gradient is that of the mean over ranks of the losses.
"""


def alone(part: Tensor) -> Tensor:
    """The gather of a single process."""
    return part


def gather_parts(part: Tensor, sizes: Sequence[int], gather: Gather) -> Tensor:
    """Gather unequal, possibly empty parts: padded with zeros to the largest size, and cut again afterwards.

    part: [n, ...], where n is this rank's entry of `sizes` [R]; every rank passes the same `sizes`.
    Returns [sum(sizes), ...] in rank order.
    """
    largest = max(sizes)
    padding = part.new_zeros((largest - len(part), *part.shape[1:]))
    padded = gather(torch.cat([part, padding]) if len(padding) else part)
    if min(sizes) == largest:
        return padded
    return torch.cat([padded[r * largest : r * largest + size] for r, size in enumerate(sizes)])
