"""Learning rates against the reference figures; parameter groups."""

import numpy as np
import pytest
from torch import nn

from clipreid.optim import parameter_groups, stage1_lr, stage2_lr
from tests.helpers.golden_models import read_case

GOLDEN, CASE = read_case("schedules")


@pytest.mark.parametrize("setting", CASE)
def test_stage1_learning_rates_match_the_reference_figures(setting):
    s = CASE[setting]["s1"]
    rates = [stage1_lr(e, s["epochs"], s["base"], s["warm"], s["init"], s["low"]) for e in range(1, s["epochs"] + 1)]
    np.testing.assert_allclose(rates, GOLDEN[f"{setting}__stage1"], rtol=1e-12)


@pytest.mark.parametrize("setting", CASE)
def test_stage2_learning_rates_match_the_reference_figures(setting):
    s = CASE[setting]["s2"]
    rates = [stage2_lr(e, s["base"], s["steps"], s["warm"], s["factor"], 0.1) for e in range(1, s["epochs"] + 1)]
    np.testing.assert_allclose(rates, GOLDEN[f"{setting}__stage2"], rtol=1e-12)


def test_a_milestone_inside_the_warmup_multiplies():
    assert stage2_lr(5, 1.0, [3, 5, 30], warmup_epochs=10, warmup_factor=0.1, gamma=0.1) == pytest.approx(0.55 * 0.01)


def test_no_warmup_starts_on_the_curve():
    assert stage2_lr(1, 2.0, [30], warmup_epochs=0, warmup_factor=0.1, gamma=0.1) == 2.0
    assert stage1_lr(10, 10, lr=1e-3, warmup_epochs=0, warmup_lr=1e-5, min_lr=1e-6) == pytest.approx(1e-6)


def test_groups_hold_every_trainable_parameter_once_and_double_the_biases():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    model[1].bias.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1, bias_lr_factor=2.0, lr_factor=3.0)
    assert [(g["names"], g["lr_factor"], g["weight_decay"]) for g in groups] == [
        (["0.weight", "1.weight", "2.weight"], 3.0, 0.1),
        (["0.bias"], 6.0, 0.1),
    ]
    expected = [model[0].weight, model[1].weight, model[2].weight, model[0].bias]
    assert all(a is b for a, b in zip([p for g in groups for p in g["params"]], expected, strict=True))


def test_a_module_without_biases_has_one_group():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False).named_parameters(), 0.0)) == 1
