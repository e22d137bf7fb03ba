"""Both stages, step after step through the real loop, loaders and engine, log the same losses on 1, 2 and 4 processes.

That the method is the same is told in float64: 1e-6 over 200 steps for a ViT, where rounding has 1e-15 to start from.
In float32 the first steps tell it, 50 of them to 1e-4 for a ViT, and 5 to 1e-3 for a ResNet with BatchNorm, where Adam
turns rounding into full steps. Later steps amplify it: one processor's kernels, over three seeds, are 3e-6 apart at
most after 100 steps of a ViT, 1e-5 after 150 and 6e-4 after 200.
"""

import pytest
import torch

from clipreid import stage1 as method
from clipreid.weights.initial import build_models
from cluster.run.manifest import Position
from cluster.settings.model_spec import model_spec
from cluster.settings.yaml_file import parse_config
from cluster.training.checkpoint_writer import Due
from cluster.training.loop import Loop
from cluster.training.stage1 import Stage1
from cluster.training.stage2 import Stage2
from shards.loading.index import ShardIndex
from tests.helpers.checkpoints import Log, NoInterrupts
from tests.helpers.processes import on_processes
from tests.helpers.tolerances import within

CASES = {
    # (architecture, type of all numbers, epochs of both stages): steps compared in each, relative difference allowed
    ("tiny_vit", torch.float64, 50): (200, 1e-6),
    ("tiny_vit", torch.float64, 4): (16, 1e-6),
    ("tiny_rn", torch.float64, 4): (16, 1e-6),
    ("tiny_vit", torch.float32, 13): (50, 1e-4),
    ("tiny_rn", torch.float32, 2): (5, 1e-3),
}
LR = 1e-3  # Large, so that the steps are felt.


class NoCheckpoints:
    """Stands where checkpoints would be written."""

    failed = False

    def before_update(self): ...
    def save(self, *_, **__): ...
    def finish(self): ...


def settings(shards, arch, epochs):
    size = [32, 32] if arch == "tiny_vit" else [64, 32]
    return parse_config(
        {
            "data": {"shards": str(shards), "loaders": 0},
            "model": {"arch": f"configs/models/{arch}.json", "pretrained": None, "image_size": size},
            # 18 of 48 images: the ranks' parts are unequal, and the last batch is short.
            "stage1": {"epochs": epochs, "batch": 18, "lr": LR, "warmup_epochs": 0},
            "stage2": {"epochs": epochs, "lr": LR, "identities": 4, "images_per_identity": 2},
            "train": {"zero_stage": 0},  # The other stages of ZeRO keep a float32 copy of the weights.
            "cluster": {"launcher": "torchrun"},
        }
    )


def losses_of_both_stages(team, shards, arch, dtype, epochs):
    """What the loop logs of each stage, [{stage, epoch, step, loss, …}]."""
    config = settings(shards, arch, epochs)
    index, log = ShardIndex.open(str(shards)), Log()
    train, spec = index.split("train"), model_spec(config, index)
    models = build_models(spec, seed=0, peers=team)
    for part in models:
        part.to(dtype)
    bank = torch.randn(len(train), spec.arch_config["embed_dim"], generator=torch.Generator().manual_seed(1)).to(dtype)
    follow(Stage1(config, team, models.text.eval(), models.tables.tokens, bank.numpy(), train), team, log, dtype)
    texts = method.text_features(models.text, models.tables.tokens, team)
    stage2 = Stage2(config, team, models, texts, index)
    stage2.engine.module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))
    follow(stage2, team, log, dtype)
    return log.entries


def follow(stage, team, log, dtype):
    from deepspeed.accelerator import get_accelerator  # By now set up for the CPU.

    # DeepSpeed sums gradients as float32, and refuses others, unless told.
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float64]
    if stage.engine.replicated is not None:
        stage.engine.replicated._engine.communication_data_type = dtype
    loop = Loop(team, NoCheckpoints(), Due(), log, NoInterrupts())
    loop.run(stage, Position(stage.number, 1, 0, 0, False))
    stage.close()


def all_cases(team, shards):
    """By case; the longest one not on 4 processes."""
    cases = [case for case in CASES if team.world_size < 4 or case[2] < 50]
    return {case: losses_of_both_stages(team, shards, *case) for case in cases}


@pytest.fixture(scope="module")
def alone(tiny_shards):
    return on_processes(1, all_cases, tiny_shards)[0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_of_every_step_do_not_depend_on_the_number_of_workers(tiny_shards, alone, world_size):
    for found in on_processes(world_size, all_cases, tiny_shards, timeout_s=120):
        for case in found:
            steps, tolerance = CASES[case]
            for stage in (1, 2):
                one, other = (
                    [e for e in entries if (e["stage"], e["step"] <= steps) == (stage, True)]
                    for entries in (alone[case], found[case])
                )
                assert len(one) == len(other) >= min(steps, 12), (case, stage)
                for a, b in zip(one, other, strict=True):
                    for name in a.keys() - {"stage", "epoch", "step", "images_per_s"}:
                        scale = max(abs(a[name]), 1e-3)
                        within(abs(a[name] - b[name]) / scale, tolerance, (case, stage, a["step"], name))


def test_the_steps_that_are_compared_change_the_losses(alone):
    for case, entries in alone.items():
        for stage in (1, 2):
            losses = [e["loss"] for e in entries if e["stage"] == stage]
            assert min(losses) < losses[0] * 0.999, case
