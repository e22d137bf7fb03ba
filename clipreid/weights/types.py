"""Tensors as a .safetensors file has them: the names of their types, and their bytes.

tensors ──▶ [types] ──▶ sealed.dump
"""

import torch
from torch import Tensor

from clipreid.weights.sealed import Stored

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the safetensors format calls them."""
DTYPES = {name: dtype for dtype, name in TYPES.items()}
PIECE_ELEMENTS = 1 << 24
"""Of a tensor, copied from a GPU at a time."""


def stored(tensor: Tensor) -> Stored:
    """A tensor as it lies in memory; one of the CPU is not copied, of a GPU's a piece at a time is."""
    flat = tensor.detach().contiguous().view(-1)
    return Stored(TYPES[tensor.dtype], tuple(tensor.shape), lambda: map(bytes_of, flat.split(PIECE_ELEMENTS)))


def bytes_of(tensor: Tensor) -> memoryview:
    """As they lie in memory, or would if they lay in one piece of the CPU's."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
