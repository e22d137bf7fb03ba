"""Random numbers from counters: the published hash, and numbers that are uniform and unrelated."""

import math

import torch

from clipreid.counter_random import _mix, _mix_int, _signed, uniforms
from tests.helpers.distributions import ks_distance


def test_the_hash_is_splitmix64():
    """First outputs for seed 1234567, as other implementations have them; the tensors wrap around like integers."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = [1234567 + n * 0x9E3779B97F4A7C15 for n in range(1, 5)]
    assert [_mix_int(state) for state in states] == published
    tensor = torch.tensor([_signed(state % 2**64) for state in states])
    assert _mix(tensor).tolist() == [_signed(value) for value in published]


def test_uniform_numbers_are_uniform_and_unrelated():
    numbers = uniforms(torch.arange(20_000), (1, 2, 3), 8)
    assert numbers.min() >= 0 and numbers.max() < 1
    for column in numbers.T:
        assert ks_distance(column, lambda x: x) < 1.95 / math.sqrt(20_000)
    shifted = torch.cat([numbers[1:], numbers[:-1]], dim=1)  # neighbouring positions, too
    assert (torch.corrcoef(shifted.T) - torch.eye(16)).abs().max() < 5 / math.sqrt(20_000)
