"""What a checkpoint costs: training stalled while the state is copied, and the write that goes on beside training.

A step (forward, losses, backward, Adam) of the ViT-B/16 under the engine of a real run, one process, and checkpoints
of its whole state (values and two moments in float32) between the steps.
"""

import argparse
import logging
import statistics
import tempfile
import time
from typing import Any

import torch

from clipreid import stage2
from clipreid.identity_table import IdentityTable
from clipreid.optim import parameter_groups
from clipreid.weights.initial import build_models
from launch.cli import Parser, place, positive
from launch.measure.published import LOSSES, model_spec
from launch.measure.timing import machine_facts, seconds

EXAMPLE = """examples:
  python launch/bench.py checkpoint
  python launch/bench.py checkpoint --dir /mnt/shared/bench --batch 64
  python launch/bench.py checkpoint --arch configs/models/small_vit.json --image-size 64x64"""
IDENTITIES = 751


def run(arguments: list[str]) -> dict[str, Any]:
    options = _options(arguments)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="checkpoint-bench-", dir=options.dir) as folder:
        bench = Bench(options.arch, options.image_size, options.batch, folder)
        figures = bench.medians(options.rounds)
    where = {"dir": options.dir or tempfile.gettempdir(), "arch": options.arch, "batch": bench.batch}
    return {"bench": "checkpoint", **machine_facts(bench.team.device), **where, "rounds": options.rounds, **figures}


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py checkpoint", description=__doc__, epilog=EXAMPLE)
    parser.add_argument(
        "--arch", default="ViT-B-16-quickgelu", help="open_clip model name or JSON file (random weights)"
    )
    parser.add_argument("--image-size", default="256x128", metavar="HxW", help="pixels")
    parser.add_argument("--batch", type=positive, help="images in a step; default: 64 on a GPU, 8 on a CPU")
    parser.add_argument(
        "--dir", type=place, metavar="FOLDER", help="where to write; default: the system's temporary folder"
    )
    parser.add_argument("--rounds", type=positive, default=3, help="checkpoints that are timed")
    options = parser.parse_args(arguments)
    try:
        height, width = map(int, options.image_size.split("x"))
    except ValueError:
        parser.error(f"--image-size {options.image_size} is not HxW, for example 256x128")
    options.image_size = (height, width)
    return options


class Bench:
    """A model under the engine, a batch to train on, and checkpoints of it."""

    def __init__(self, arch: str, image_size: tuple[int, int], batch: int | None, folder: str):
        from cluster.ranks.process import join_process_group
        from cluster.run.storage import Storage
        from cluster.training.checkpoint import Retention
        from cluster.training.checkpoint_writer import CheckpointWriter, Origin
        from cluster.training.engine import Engine, Replicated
        from cluster.training.trained_table import TrainedTable

        self.team = join_process_group(timeout_s=600)
        device = self.team.device
        self.batch = batch or (64 if device.type == "cuda" else 8)
        spec = model_spec(arch, image_size, IDENTITIES)
        model, _, tables = build_models(spec)
        self.classifiers = tables.to(device).classifiers
        groups = parameter_groups(model.train().named_parameters(), weight_decay=1e-4, bias_lr_factor=2.0)
        self.engine = Engine(
            replicated=Replicated(model, groups, team=self.team, zero_stage=1),
            tables=[TrainedTable(table.name, table, weight_decay=1e-4) for table in self.classifiers],
        )
        self.engine.set_lr(5e-6)
        origin = Origin(settings={}, fingerprint="bench")
        self.writer = CheckpointWriter(Storage(folder), self.team, origin, Retention(keep=1), timeout_s=600)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(self.batch, 3, *image_size, generator=generator).to(device)
        self.labels = (torch.arange(self.batch) // 4).to(device)
        texts = torch.randn(IDENTITIES, model.image_encoder.widths[2], generator=generator)
        self.texts = IdentityTable.frozen("texts", IDENTITIES, texts.to(device))
        self.saved = 0

    def step(self) -> None:
        with torch.autocast(self.team.device.type, torch.bfloat16, enabled=self.team.device.type == "cuda"):
            output = self.engine(self.images)
        losses = stage2.losses(output, self.labels, self.classifiers, LOSSES, text_features=self.texts)
        self.engine.backward(losses["loss"])
        self.writer.before_update()
        self.engine.step()

    def save(self) -> None:
        from cluster.run.manifest import Position

        self.saved += 1
        self.writer.save(Position(2, 1, self.saved, self.saved, False), self.engine)

    def medians(self, rounds: int) -> dict[str, Any]:
        """Medians. A round: a step, a checkpoint, a step beside its writing; and a checkpoint that is waited for."""
        device = self.team.device
        times: dict[str, list[float]] = {"step": [], "stalled": [], "beside": [], "write": []}
        self.step()
        self.save()
        for _ in range(rounds):
            self.writer.finish()
            times["step"].append(seconds(self.step, device))
            times["stalled"].append(seconds(self.save, device))
            times["beside"].append(seconds(self.step, device))
            self.writer.finish()
            start = time.perf_counter()
            self.save()
            self.writer.finish()
            times["write"].append(time.perf_counter() - start)
        step, stalled, beside, write = (statistics.median(values) for values in times.values())
        return {
            "state_bytes": 3 * 4 * sum(self.engine.numels().values()),
            "step_ms": round(step * 1e3, 1),
            "stalled_ms": round(stalled * 1e3, 1),
            "stalled_share_of_step": round(stalled / step, 4),
            "step_beside_write_ms": round(beside * 1e3, 1),
            "write_ms": round(write * 1e3, 1),
        }
