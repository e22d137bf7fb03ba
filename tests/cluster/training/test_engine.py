"""The DeepSpeed engine: averaged gradients, and a state that fits any number of workers, bit by bit."""

import pytest
import torch
from torch import nn

from cluster.training.engine import Replicated
from cluster.training.pieces import KEYS
from tests.helpers.processes import on_processes
from tests.helpers.tolerances import close


def make_module():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def groups_of(module):
    return [
        {
            "params": [p for n, p in module.named_parameters() if ("bias" in n) == bias],
            "lr_factor": 1.0 + bias,
            "weight_decay": 1e-2,
            "betas": (0.9, 0.999),
        }
        for bias in (False, True)
    ]


def batch(step):
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step))


def run(team, zero_stage, steps, start=0, state=None):
    """Train on parts of the same global batches; the weights and this rank's pieces."""
    module = make_module()
    engine = Replicated(module, groups_of(module), team=team, zero_stage=zero_stage)
    if state is not None:
        for (name, key), places in engine.slots(team.rank).items():
            for slot in places:
                slot.tensor.copy_(state[name][key][slot.start : slot.start + slot.tensor.numel()])
        engine.loaded(start)
    for group in engine.adam.param_groups:
        group["lr"] = 0.05 * group["lr_factor"]
    for step in range(start, start + steps):
        part = batch(step).chunk(team.world_size)[team.rank]
        engine.backward(engine(part).square().mean())
        engine.step()
    pieces = {f.name: (f.start, {k: getattr(f, k).clone() for k in KEYS}) for f in engine.pieces(team.rank)}
    return {n: p.detach().clone() for n, p in module.named_parameters()}, pieces


def plain(steps):
    module = make_module()
    groups = groups_of(module)
    for group in groups:
        group["lr"] = 0.05 * group["lr_factor"]
    adam = torch.optim.Adam(groups)
    for step in range(steps):
        adam.zero_grad()
        module(batch(step)).square().mean().backward()
        adam.step()
    return dict(module.named_parameters())


def whole(results):
    """All ranks' pieces put together: {name: {key: flat tensor}}."""
    full = {n: {k: torch.full((p.numel(),), torch.nan) for k in KEYS} for n, p in results[0][0].items()}
    for _, pieces in results:
        for name, (start, parts) in pieces.items():
            for key, piece in parts.items():
                assert full[name][key][start : start + piece.numel()].isnan().all()
                full[name][key][start : start + piece.numel()] = piece
    return full


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_two_ranks_equal_plain_adam_and_resume_bitwise_and_on_one_rank(zero_stage):
    straight = on_processes(2, run, zero_stage, 6)
    for name, value in plain(6).items():
        close(straight[0][0][name], value, atol=1e-6, what=name)
    half = whole(on_processes(2, run, zero_stage, 3))
    resumed = on_processes(2, run, zero_stage, 3, 3, half)
    alone = on_processes(1, run, zero_stage, 3, 3, half)
    for name, value in straight[0][0].items():
        assert torch.equal(resumed[0][0][name], value)
        close(alone[0][0][name], value, atol=1e-6, what=name)
