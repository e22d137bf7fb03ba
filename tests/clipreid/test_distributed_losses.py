"""Losses and gradients on 2 and 4 processes equal those of one process with the same global batch, in float64.

Small models of both kinds, BatchNorm over all ranks, every loss variant. The gradients are averaged over ranks, as
the training engine does. The processes are started once per world size and run all cases.
"""

from typing import get_args

import pytest
import torch

from clipreid import stage1, stage2
from clipreid.loss_settings import TextLoss
from clipreid.model.batchnorm import globalize_batchnorm
from clipreid.weights.initial import build_models
from cluster.ranks.team import Team
from tests.helpers.golden_models import ROOT_CONFIGS
from tests.helpers.processes import on_processes
from tests.helpers.settings import loss_settings, model_spec

IDENTITIES, IMAGES_PER_IDENTITY = 8, 2
BATCH = IDENTITIES * IMAGES_PER_IDENTITY
ARCHS = {"vit": "tiny_vit.json", "resnet": "tiny_rn.json"}
VARIANTS = {
    **{
        f"{text_loss}, {levels} levels": (text_loss, levels, False)
        for text_loss in get_args(TextLoss)
        for levels in (2, 3)
    },
    "one stage": ("i2t+t2i", 3, True),
}
STAGE1_SIZES = (16, 7, 3, 1)  # of the batch: with 4 ranks unequal parts, and ranks without any image


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def models(kind):
    path = str(ROOT_CONFIGS / ARCHS[kind])
    sie = {"sie": "camera", "cameras": 3} if kind == "vit" else {}
    spec = model_spec(path, image_size=(64, 32), identities=12, **sie)
    model, text = build_models(spec, seed=0)
    return model.double().train(), text.double()


def run_stage2(team, kind, variant):
    text_loss, levels, one_stage = VARIANTS[variant]
    model, text = models(kind)
    if team.world_size > 1:
        globalize_batchnorm(model, team)
    own = stage1.rank_slice(BATCH, team.rank, team.world_size)
    labels = torch.tensor([3, 0, 7, 11, 5, 2, 9, 1]).repeat_interleave(IMAGES_PER_IDENTITY)[own]
    images, cameras = random(BATCH, 3, 64, 32, seed=1)[own], (torch.arange(BATCH) % 4 - 1)[own]
    settings = loss_settings(text_weight=0.7, text_loss=text_loss, triplet_levels=levels)
    own_texts = stage2.batch_texts(text, labels, IMAGES_PER_IDENTITY) if one_stage else None
    frozen = None if one_stage else random(12, own_texts_width(text), seed=2)
    parts = stage2.losses(model(images, cameras), labels, frozen, settings, team, own_texts)
    parts["loss"].backward()
    statistics = {name: buffer for name, buffer in model.named_buffers() if "running" in name}
    return merged(team, parts, {"model": model, "text": text}), statistics


def own_texts_width(text):
    return text.text_encoder.text_projection.shape[1]


def run_stage1(team, size):
    _, text = models("vit")
    images = random(size, own_texts_width(text), seed=3)
    labels = torch.tensor([2, 5, 2, 2, 0, 7, 11, 5, 5, 1, 3, 0, 2, 9, 9, 4])[:size]
    own = stage1.rank_slice(size, team.rank, team.world_size)
    parts = stage1.step(text, images[own], labels[own], labels, team)
    parts["loss"].backward()
    return merged(team, parts, {"text": text})


def merged(team, parts, modules):
    """Means over ranks: of the loss parts, and of the gradients, as the engine makes them."""
    values = {name: team.all_reduce_sum(part) / team.world_size for name, part in parts.items()}
    for module in modules:
        for name, parameter in modules[module].named_parameters():
            if parameter.grad is not None:
                values[f"{module}.{name}"] = team.all_reduce_sum(parameter.grad) / team.world_size
    return values


def run_all(team):
    """Every case by name; the same on every rank."""
    results = {}
    for kind in ARCHS:
        for variant in VARIANTS:
            results[f"{kind}: {variant}"], statistics = run_stage2(team, kind, variant)
        results[f"{kind}: running statistics"] = statistics
    for size in STAGE1_SIZES:
        results[f"stage 1: {size} images"] = run_stage1(team, size)
    return results


@pytest.fixture(scope="module")
def alone():
    return run_all(Team())


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_and_gradients_do_not_depend_on_the_number_of_processes(alone, world_size):
    ranks = on_processes(world_size, run_all, timeout_s=120)
    assert len(alone) == 2 * (len(VARIANTS) + 1) + len(STAGE1_SIZES)
    for rank in ranks:
        assert rank.keys() == alone.keys()
        for case, expected in alone.items():
            assert rank[case].keys() == expected.keys(), case
            largest = max(value.abs().max() for value in expected.values())
            for name, value in expected.items():
                # A gradient that is zero by symmetry is only rounding: measured against the largest one.
                scale = max(value.abs().max(), 1e-6 * largest)
                assert (rank[case][name] - value).abs().max() <= 1e-6 * scale, (case, name)


def test_every_case_has_the_gradients_it_should(alone):
    """What is compared above is there: tokens learn in stage 1 and the one-stage method only."""
    for case, values in alone.items():
        if "statistics" not in case:
            assert ("text.prompt_learner.tokens" in values) == (case.startswith("stage 1") or "one stage" in case)
            assert any(name.startswith("model.image_encoder") for name in values) != case.startswith("stage 1")
