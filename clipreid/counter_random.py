"""Random numbers that are a hash of what they are for, so that no generator has a state to be saved.

    (seed, epoch, step), position in the global batch ──▶ [counter_random] ──▶ augment

SplitMix64 (Steele, Lea, Flood 2014), whose n-th output is a hash of seed + n * gamma. The same on every device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def uniforms(positions: Tensor, key: Sequence[int], count: int) -> Tensor:
    """`count` numbers in [0, 1), float64 [b, count], for each position (int64 [b]) under a key of integers."""
    base = 0
    for word in key:
        base = _mix_int(base + (word & _MASK) * _GAMMA + _GAMMA)
    streams = _mix(positions * _signed(_GAMMA) + _signed(base))
    counters = torch.arange(1, count + 1, device=positions.device) * _signed(_GAMMA)
    bits = _mix(streams[:, None] + counters)
    return _shift_right(bits, 11).double() * 2.0**-53


def _mix_int(x: int) -> int:
    for shift, multiplier in _MULTIPLIERS:
        x &= _MASK
        x = (x ^ (x >> shift)) * multiplier
    return x & _MASK


def _mix(x: Tensor) -> Tensor:
    """The same on int64 tensors, whose products wrap around on every device."""
    for shift, multiplier in _MULTIPLIERS:
        x = (x ^ _shift_right(x, shift)) * _signed(multiplier)
    return x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift without the sign bit, which `>>` would draw in."""
    mask: int = 2 ** (64 - bits) - 1
    return (x >> bits) & mask


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
