"""A step on a GPU: the host never waits for the device, except for the losses while the backward pass runs."""

import pytest
import torch

from clipreid.weights.initial import build_models
from cluster.ranks.process import join_process_group, leave_process_group
from cluster.ranks.team import Team
from cluster.training.engine import zero_settings
from cluster.training.loop import Requests, StepReduction
from cluster.training.stage1 import Stage1
from launch.measure.loops import IDENTITIES, OurLoop, PlainLoop
from tests.helpers.devices import DEVICE, no_synchronisation, on_gpu
from tests.helpers.precision import RESNET, make_parts, make_stage
from tests.helpers.settings import model_spec
from tests.helpers.shards import write_shards

NOTHING = Requests(save=False, stop=False, drain_poll=False, failed=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on-gpu")
    write_shards(folder / "shards", {"train": {f"t{number}": 8 for number in range(8)}})
    return folder


@pytest.fixture(scope="module")
def team():
    return Team(device=torch.device(DEVICE))


@pytest.fixture(scope="module")
def joined():
    """This process as a group of its own, which DeepSpeed asks for."""
    pytest.importorskip("deepspeed")
    team = join_process_group(timeout_s=60)
    yield team
    leave_process_group(team)


def take_steps(stage, team):
    """Three steps as the loop takes them, the third without any synchronisation. Returns its losses."""
    batches = list(stage.batches(1, 1))[:3]

    def step(batch):
        stage.engine.remember_buffers()
        losses = stage.losses(batch)
        reduction = StepReduction(team, losses, NOTHING)
        stage.engine.backward(losses["loss"])
        means, _ = reduction.wait()
        stage.engine.step()
        return means

    for batch in batches[:2]:
        step(batch)
    with no_synchronisation():
        return step(batches[2])


@on_gpu
@pytest.mark.parametrize("features", ["instance", "average"])
def test_a_step_of_stage_1_does_not_wait_for_the_gpu(folder, team, features):
    changes = {"stage1.batch": 16 if features == "instance" else 2, "stage1.features": features}
    config, index, spec, models = make_parts(team, folder, **changes)
    train, width = index.split("train"), spec.arch_config["embed_dim"]
    bank = torch.randn(len(train.labels), width, generator=torch.Generator().manual_seed(0)).numpy()
    text, tables = models.text.eval().to(team.device), models.tables.to(team.device)
    stage = Stage1(config, team, text, tables.tokens, bank, train)
    assert take_steps(stage, team)["loss"] > 0


@on_gpu
@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_rn"])
@pytest.mark.parametrize("mode", ["eager", "plain"])
def test_the_benchmarks_step_of_stage_2_waits_only_where_it_is_written_the_usual_way(mode, arch):
    spec = model_spec(f"configs/models/{arch}.json", image_size=(32, 16), identities=IDENTITIES)
    kind = PlainLoop if mode == "plain" else OurLoop
    model, _, tables = build_models(spec)
    loop = kind(model, tables, (16, 3, 32, 16), torch.device(DEVICE), amp=True)
    loop.step()
    if mode == "plain" and DEVICE == "cuda":
        with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
            loop.step()
    else:
        with no_synchronisation():
            assert loop.step()["loss"] > 0


@on_gpu
@pytest.mark.parametrize("changes", [{}, RESNET, {"stage2.text_loss": "i2tce+t2i"}], ids=["vit", "resnet", "texts"])
def test_a_step_of_stage_2_under_deepspeed_does_not_wait_for_the_gpu(folder, joined, changes):
    stage = make_stage(joined, folder, **changes)
    assert take_steps(stage, joined)["loss"] > 0
    stage.close()


def test_gradients_are_exchanged_beside_the_backward_pass_of_several_gpus():
    """One alone has nothing to send, and is spared the synchronisation that DeepSpeed ends such a pass with."""
    gpu = torch.device("cuda")
    overlapped = {n: zero_settings(1, Team(world_size=n, device=gpu))["overlap_comm"] for n in (1, 2)}
    assert overlapped == {1: False, 2: True}
    assert not zero_settings(1, Team(world_size=2))["overlap_comm"]
