"""Losses, gradients and weights on 2, 3, 4 and 8 processes equal those of one process with the same global batch, in
float64.

Small models of both kinds, BatchNorm over all ranks, every loss variant, identity tables in row blocks. The gradients
of what is replicated are averaged over ranks, as the training engine does. The processes are started once per world
size and run all cases.
"""

from typing import get_args

import pytest
import torch

from clipreid import stage1, stage2
from clipreid.loss_settings import TextLoss
from clipreid.model.batchnorm import globalize_batchnorm
from clipreid.optim import adam
from clipreid.peers import rank_slice
from clipreid.weights.initial import build_models
from cluster.ranks.team import Team
from cluster.training.trained_table import TrainedTable
from tests.helpers.golden_models import ROOT_CONFIGS
from tests.helpers.processes import on_processes
from tests.helpers.settings import loss_settings, model_spec
from tests.helpers.tables import gradient_of, table_of

STEPS, LR = 5, 1e-3
IDENTITIES, IMAGES_PER_IDENTITY, OF_ALL = 24, 2, 29  # No number of processes divides 29.
BATCH = IDENTITIES * IMAGES_PER_IDENTITY
ARCHS = {"vit": "tiny_vit.json", "resnet": "tiny_rn.json"}
VARIANTS = {
    **{
        f"{text_loss}, {levels} levels": (text_loss, levels, "two_stage")
        for text_loss in get_args(TextLoss)
        for levels in (2, 3)
    },
    "one stage": ("i2t+t2i", 3, "one_stage"),
}
STAGE1_SIZES = (16, 7, 3, 1)  # Of the batch: with many ranks unequal parts, and ranks without any image.
STAGE1_IDENTITIES = (12, 5)  # Of 8 ranks some own none.


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def models(kind, identities, team):
    path = str(ROOT_CONFIGS / ARCHS[kind])
    sie = {"sie": "camera", "cameras": 3} if kind == "vit" else {}
    spec = model_spec(path, image_size=(32, 16), identities=identities, **sie)
    model, text, tables = build_models(spec, seed=0, peers=team)
    return model.double().train(), text.double(), tables.to(torch.float64)


class Trained:
    """Replicated parameters and tables with their Adams, moved as the engine moves them."""

    def __init__(self, team, named, tables):
        self.team, self.named, self.tables = team, dict(named), {table.name: table for table in tables}
        self.trained = [TrainedTable(table.name, table, weight_decay=1e-4) for table in tables]
        self.adam = adam([{"params": list(self.named.values()), "weight_decay": 1e-4}])
        for optimizer in (self.adam, *(table.adam for table in self.trained)):
            optimizer.param_groups[0]["lr"] = LR
        self.first_gradients = {}

    def step(self, loss):
        loss.backward()
        for parameter in self.named.values():
            if parameter.grad is not None:
                parameter.grad = self.team.all_reduce_sum(parameter.grad) / self.team.world_size
        if not self.first_gradients:
            gradients = {name: parameter.grad for name, parameter in self.named.items() if parameter.grad is not None}
            self.first_gradients = self.whole(gradients, gradient_of)
        self.adam.step()
        self.adam.zero_grad()
        for table in self.trained:
            table.step()

    def whole(self, values, of_table):
        """values: of what is replicated. of_table: what of a rank's table to put together."""
        whole = {name: value.detach().clone() for name, value in values.items()}
        for name, table in self.tables.items():
            whole[name] = torch.cat(self.team.all_gather_objects(of_table(table).detach(), "compare"))
        return whole

    def results(self, logged):
        gradients = {f"gradient of {name}": value for name, value in self.first_gradients.items()}
        return logged | gradients | self.whole(self.named, lambda table: table.block)


def run_stage2(team, kind, variant):
    text_loss, levels, method = VARIANTS[variant]
    model, text, tables = models(kind, OF_ALL, team)
    if team.world_size > 1:
        globalize_batchnorm(model, team)
    own = rank_slice(BATCH, team.rank, team.world_size)
    settings = loss_settings(text_weight=0.7, text_loss=text_loss, triplet_levels=levels)
    one_stage = method == "one_stage"
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained = Trained(team, named, tables if one_stage else tables.classifiers)
    bank = table_of(random(OF_ALL, text.text_encoder.text_projection.shape[1], seed=2), team, frozen=True)
    logged = {}
    for step in range(STEPS):
        identities = torch.randperm(OF_ALL, generator=torch.Generator().manual_seed(step))[:IDENTITIES]
        labels = identities.repeat_interleave(IMAGES_PER_IDENTITY)[own]
        images, cameras = random(BATCH, 3, 32, 16, seed=step)[own], (torch.arange(BATCH) % 4 - 1)[own]
        output, own_texts = model(images, cameras), None
        if one_stage:
            own_texts = stage2.batch_texts(text, tables.tokens, identities, IMAGES_PER_IDENTITY, team)
        elif text_loss.replace("i2tce", "").strip("+") not in ("", "none"):
            own_texts = bank.fetch(identities.tensor_split(team.world_size), team)
            own_texts = own_texts.repeat_interleave(IMAGES_PER_IDENTITY, dim=0)
        parts = stage2.losses(
            output, labels, tables.classifiers, settings, team, text_features=bank, own_texts=own_texts
        )
        logged |= {f"step {step}: {n}": team.all_reduce_sum(part) / team.world_size for n, part in parts.items()}
        trained.step(parts["loss"])
    statistics = {name: buffer for name, buffer in model.named_buffers() if "running" in name}
    return trained.results(logged) | statistics


def run_stage1(team, size, identities, average):
    _, text, tables = models("vit", identities, team)
    trained = Trained(team, [], [tables.tokens])
    width, logged = text.text_encoder.text_projection.shape[1], {}
    means = table_of(random(identities, width, seed=4), team, frozen=True)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        if average:
            batch = torch.randperm(identities, generator=generator)[:size]
            parts = stage1.average_step(text, tables.tokens, means, batch, team)
        else:
            images, labels = random(size, width, seed=step), torch.randint(identities, (size,), generator=generator)
            parts = stage1.step(text, tables.tokens, images, labels, team)
        logged |= {f"step {step}: {n}": team.all_reduce_sum(part) / team.world_size for n, part in parts.items()}
        trained.step(parts["loss"])
    return trained.results(logged)


def run_all(team):
    """Every case by name, of stage 2's losses only some on 3 and 8 processes; the same on every rank."""
    variants = VARIANTS if team.world_size in (1, 2, 4) else ("i2tce+t2i, 3 levels", "one stage")
    results = {f"{kind}: {variant}": run_stage2(team, kind, variant) for kind in ARCHS for variant in variants}
    for identities in STAGE1_IDENTITIES:
        for average in (False, True):
            for size in STAGE1_SIZES:
                name = f"stage 1{' average' * average}: {size} of {identities} identities"
                results[name] = run_stage1(team, size, identities, average)
    return results


@pytest.fixture(scope="module")
def alone():
    return run_all(Team())


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_losses_gradients_and_weights_do_not_depend_on_the_number_of_processes(alone, world_size):
    ranks = on_processes(world_size, run_all, timeout_s=300)
    for rank in ranks:
        assert rank.keys() == alone.keys() or world_size in (3, 8)
        for case in rank:
            expected = alone[case]
            assert rank[case].keys() == expected.keys(), case
            largest = max(value.abs().max() for name, value in expected.items() if name.startswith("gradient"))
            for name, value in expected.items():
                # A gradient that is zero by symmetry is only rounding: measured against the largest one; and a weight
                # that it moves against a step.
                scale = max(value.abs().max(), 1e-6 * largest if name.startswith("gradient") else LR)
                assert (rank[case][name] - value).abs().max() <= 1e-6 * scale, (case, name)


def test_every_case_has_the_gradients_it_should(alone):
    """What is compared above is there, and moves: tokens learn in stage 1 and the one-stage method only."""
    for case, values in alone.items():
        stage_1 = case.startswith("stage 1")
        assert ("gradient of prompt_learner.tokens" in values) == (stage_1 or "one stage" in case)
        assert ("gradient of classifier.weight" in values) != stage_1
        assert any(name.startswith("gradient of image_encoder") for name in values) != stage_1
        if ": 1 of" not in case:  # A single image has nothing to be told from.
            assert all(value.any() for name, value in values.items() if "gradient of" in name and "tokens" in name)
