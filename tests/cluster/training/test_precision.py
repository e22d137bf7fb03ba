"""Stage 2 as a real run takes it: precision, losses that are not finite, and nothing that makes the host wait.

Two processes do all the training, and the tests look at what they saw.
"""

import ast
import inspect
import math
import shutil

import pytest
import torch

from clipreid import augment, counter_random, identity_softmax, losses, stage1, stage2, to_device
from clipreid.model import batchnorm, encoders
from cluster.run.manifest import Position
from cluster.training import stage1 as cluster_stage1
from cluster.training import stage2 as cluster_stage2
from cluster.training.engine import Replicated
from cluster.training.trained_table import TrainedTable
from tests.helpers.precision import (
    RESNET,
    compiled_losses,
    failing_run,
    failing_stage1,
    one_rank_fails,
    precision_run,
    synchronisations,
)
from tests.helpers.processes import on_processes
from tests.helpers.shards import write_shards
from tests.helpers.tolerances import close, within

VARIANTS = {
    "vit": {"model.sie": "camera+view"},
    "bf16": {"train.precision": "bf16"},
    "zero 0": {"train.zero_stage": 0},
    "resnet": RESNET,
    "contrastive": {"stage2.text_loss": "i2tce+t2i"},
    "one stage": {"method": "one_stage", "stages": [2], "stage1.lr": 1e-3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    write_shards(folder / "shards", {"train": {f"t{number}": 8 for number in range(8)}})
    return folder


def run_all(team, folder):
    runs = {precision: precision_run(team, folder, precision) for precision in ("float32", "bf16")}
    runs |= {kind: failing_run(team, folder, kind) for kind in ("text", "loss", "parameter")}
    runs["stage 1"] = failing_stage1(team, folder)
    runs["synchronisations"] = {name: synchronisations(team, folder, changes) for name, changes in VARIANTS.items()}
    return runs


@pytest.fixture(scope="module")
def runs(folder):
    return on_processes(1, run_all, str(folder))[0]


def test_bf16_is_for_the_encoder_alone(runs):
    wide = {torch.float32}
    assert runs["bf16"]["types"] == {"encoder": {torch.bfloat16}, "losses": wide, "parameters": wide, "state": wide}
    assert runs["float32"]["types"]["encoder"] == wide


def test_a_learning_rate_of_5e_6_moves_parameters_in_bf16_as_in_float32(runs):
    exact, rounded = (
        {name: followed(name, moved) for name, moved in runs[precision]["moved"].items()}
        for precision in ("float32", "bf16")
    )
    assert len(runs["bf16"]["log"]) >= 4
    for name, moved in exact.items():
        assert moved.abs().max() > 0, name
        # Adam's first steps have the size of the learning rate, whatever the gradient's rounding.
        close(rounded[name].abs().mean(), moved.abs().mean(), rtol=0.25, what=name)
    together = [torch.cat([moved.flatten() for moved in run.values()]) for run in (exact, rounded)]
    within(1 - torch.cosine_similarity(*together, dim=0), 0.2)


def followed(name, moved):
    """All but the biases of attention's keys: no loss depends on them, so rounding alone says which way they go."""
    queries, _, values = moved.chunk(3) if name.endswith("in_proj_bias") else (moved, None, moved[:0])
    return torch.cat([queries, values])


def test_bf16_losses_follow_float32(runs):
    for exact, rounded in zip(runs["float32"]["log"], runs["bf16"]["log"], strict=True):
        close(rounded["loss"], exact["loss"], rtol=0.02)
        assert rounded["loss"] != exact["loss"]


@pytest.mark.parametrize(("kind", "part"), [("text", "i2tce"), ("loss", "tri_img")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_where(runs, kind, part):
    run = runs[kind]
    assert run["steps"] == 2 and len(run["identities"]) == 4
    assert f"stage 2, epoch 1, step 3: {part}" in run["message"]
    assert f"identities of the batch: {', '.join(run['identities'])};" in run["message"]


@pytest.mark.parametrize("kind", ["text", "loss"])
def test_the_state_before_the_bad_step_is_saved_bit_for_bit(runs, kind):
    before, saved = runs[kind]["before"], runs[kind]["saved"]
    assert saved["position"] == Position(2, 1, 2, 2, False)
    assert before["pieces"].keys() == saved["pieces"].keys()
    for name, pieces in before["pieces"].items():
        assert all(torch.equal(saved["pieces"][name][key], value) for key, value in pieces.items()), name
    running = [name for name in before["buffers"] if name.endswith(("running_mean", "running_var", "tracked"))]
    assert len(running) > 10
    assert all(torch.equal(saved["buffers"][name], before["buffers"][name]) for name in running)
    assert all(before["buffers"][name] == 2 for name in running if name.endswith("tracked"))


def test_spoilt_parameters_are_not_saved(runs):
    assert "the step before left parameters that are not finite" in runs["parameter"]["message"].lower()
    assert runs["parameter"]["saved"] == {}


def test_stage_1_stops_as_well_with_the_state_before(runs):
    run = runs["stage 1"]
    assert run["steps"] == 2 and len(run["identities"]) > 4
    assert "stage 1, epoch 1, step 3: i2t, t2i, loss is not finite" in run["message"]
    assert f"identities of the batch: {', '.join(run['identities'])};" in run["message"]
    assert run["saved"]["position"] == Position(1, 1, 2, 2, False)
    assert run["before"].keys() == run["saved"]["pieces"].keys() and len(run["before"]) == 1
    for name, pieces in run["before"].items():
        assert all(torch.equal(run["saved"]["pieces"][name][key], value) for key, value in pieces.items()), name


def fail_on_two(team, folder):
    return one_rank_fails(team, folder), failing_stage1(team, folder)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_of_them_in_the_same_step(folder):
    (first, stage1), (second, stage1_too) = on_processes(2, fail_on_two, str(folder))
    assert first["message"] == second["message"] and first["steps"] == second["steps"] == 1
    assert "stage 2, epoch 1, step 2: tri_img" in first["message"]
    identities = sorted(first["identities"] + second["identities"])
    assert len(identities) == 4 and f"identities of the batch: {', '.join(identities)};" in first["message"]
    assert first["position"] == second["position"] == Position(2, 1, 1, 1, False)
    assert stage1["message"] == stage1_too["message"] and "step 3: i2t, t2i, loss" in stage1["message"]
    assert stage1["steps"] == stage1_too["steps"] == 2


@pytest.mark.parametrize("name", VARIANTS)
def test_no_operation_of_a_step_makes_the_host_wait(runs, name):
    assert runs["synchronisations"][name] == []


def test_no_code_of_a_step_moves_values_to_the_host():
    """What leaves no trace among the operations of a CPU: `.cpu()`, `.tolist()`, `.numpy()`."""
    step = [
        augment,
        counter_random,
        batchnorm,
        encoders,
        losses,
        stage2,
        identity_softmax,
        to_device,
    ]
    step += [stage1.step, stage1.average_step, stage1.encode_identities, cluster_stage1.Stage1.losses]
    step += [cluster_stage2.ToDevice, cluster_stage2.Stage2.losses]
    step += [Replicated.backward, Replicated.step, Replicated.remember_buffers, TrainedTable.step]
    for place in step:
        source = inspect.cleandoc("\n" + inspect.getsource(place))
        calls = [node.func.attr for node in ast.walk(ast.parse(source)) if _is_method_call(node)]
        assert not {"item", "cpu", "tolist", "numpy", "nonzero", "masked_select", "synchronize"} & set(calls), place


def _is_method_call(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)


def compiled_and_eager(team, folder):
    return {compiled: compiled_losses(team, folder, compiled) for compiled in (False, True)}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_encoder_gives_the_losses_of_an_eager_one_on_two_processes(folder):
    first, second = on_processes(2, compiled_and_eager, str(folder))
    assert first == second
    (eager, no_graphs), (compiled, graphs) = first[False], first[True]
    assert (no_graphs, graphs) == (0, 1)
    assert len(compiled) >= 4 and all(map(math.isfinite, compiled))
    close(compiled, eager, rtol=1e-4)
