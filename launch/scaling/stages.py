"""Steps of stage 1 and stage 2 as a run takes them, on any number of identities, without a dataset on disk.

    Case ──▶ [stages: cluster.training's Stage1, Stage2 on made-up images] ──▶ seconds, bytes, memory of a rank

The stages, their engine, the losses' reduction and the tables are those of a run. Made up are the images and labels:
at every N the identities of a step's batch stand at the same relative places of the tables, so that equally many are
distinct and as many rows cross ranks, and what differs between two N is what N costs.

b = images of a rank, B = of the global batch, N = identities, D = width of the projected feature
"""

import resource
import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipreid.identity_table import IdentityTable
from clipreid.model.spec import ModelSpec
from clipreid.peers import rank_slice
from clipreid.weights.initial import build_models
from cluster.ranks.team import Team
from cluster.settings.config import Config
from cluster.settings.model_spec import configured_spec
from cluster.settings.yaml_file import parse_config
from cluster.training.engine import Engine
from cluster.training.loop import Requests, StepReduction
from cluster.training.stage1 import Stage1
from cluster.training.stage2 import Stage2
from launch.scaling.traffic import Traffic
from shards.loading.pk_loader import PKBatch, PKLoader

PER_IDENTITY = 4
"""K of stage 2. In stage 1 a batch's images are of different identities, which is the dearest."""
PLACES = 1000
"""Relative places of the tables that identities of a batch are drawn from."""
WARM_UP_STEPS = 2
COUNTED_STEPS = 3


@dataclass(frozen=True)
class Case:
    """What a step is taken of."""

    stage: int
    identities: int
    """N."""
    batch: int
    """B."""
    arch: str
    image_size: tuple[int, int]
    """Pixels."""
    zero_stage: int = 1
    micro_batch: int | None = None
    """Images that the image encoder takes at a time, None: all of a rank's."""

    def config(self) -> Config:
        """Settings of such a run, published ones where a case says nothing else."""
        tree = {
            "data": {"shards": "made-up", "loaders": 0},
            "model": {"arch": self.arch, "pretrained": None, "image_size": list(self.image_size)},
            "stage1": {"batch": self.batch},
            "stage2": {"identities": max(self.batch // PER_IDENTITY, 1), "images_per_identity": PER_IDENTITY},
            "train": {"zero_stage": self.zero_stage, "micro_batch": self.micro_batch},
        }
        return parse_config(tree)

    def spec(self) -> ModelSpec:
        """Raises ModelError where architecture and image size do not fit."""
        return configured_spec(self.config(), cameras=1, views=1, identities=self.identities, noun="person")

    def batch_identities(self, step: int, count: int) -> np.ndarray:
        """Labels, int64, of a step's global batch, all different: the same places of the tables at each N."""
        places = min(PLACES, self.identities)
        drawn = np.random.default_rng([0, step]).permutation(places)[:count]
        return drawn * self.identities // places


class Steps:
    """A stage as one rank has it, and its steps."""

    def __init__(self, case: Case, team: Team):
        self.case, self.team = case, team
        config = case.config()
        self.models = build_models(case.spec(), None, config.run.seed, team)
        self.models.model.to(team.device)
        self.models.tables.to(team.device)
        if self.models.text is not None:
            self.models.text.to(team.device).eval()
        self.texts: IdentityTable | None = None
        self.stage: Stage1 | Stage2
        if case.stage == 1:
            self.stage = self._stage1(config)
        else:
            self.stage = self._stage2(config)
            self.stage.model.train()
        self.stage.engine.set_lr(self.stage.lr(1))
        self.taken = 0

    def _stage1(self, config: Config) -> Stage1:
        text, tokens = self.models.text, self.models.tables.tokens
        assert text is not None and tokens is not None
        return Stage1(config, self.team, text, tokens, self._features(), cast(Any, _split(self.case.identities)))

    def _stage2(self, config: Config) -> "Stage2OfMadeUpImages":
        self.texts = self._texts()
        index = SimpleNamespace(split=lambda name: _split(self.case.identities))
        return Stage2OfMadeUpImages(config, self.team, self.models, self.texts, cast(Any, index))

    def _texts(self) -> IdentityTable:
        """Drawn: the bridge's pass over N prompts is no part of a step."""
        n = self.case.identities
        own = rank_slice(n, self.team.rank, self.team.world_size)
        block = torch.tensor(self._features()[own], device=self.team.device)
        return IdentityTable.frozen("texts", n, block, self.team)

    def _features(self) -> np.ndarray:
        """Made up, [N, D], in the memory of N + D numbers; a run maps those of its images from a file."""
        width, n = self.models.model.image_encoder.widths[2], self.case.identities
        numbers = np.random.default_rng(0).standard_normal(n + width, np.float32)
        return np.lib.stride_tricks.sliding_window_view(numbers, width)[:n]

    @property
    def engine(self) -> Engine:
        return self.stage.engine

    def batch(self, step: int) -> Any:
        """As the stage's `batches` gives it."""
        case, team = self.case, self.team
        if case.stage == 1:
            return case.batch_identities(step, case.batch)
        identities = case.batch_identities(step, case.batch // PER_IDENTITY)
        own = rank_slice(case.batch, team.rank, team.world_size)
        labels = torch.from_numpy(identities.repeat(PER_IDENTITY)[own])
        images = np.random.default_rng(step).integers(0, 256, (case.batch, 3, *case.image_size), np.uint8)[own]
        unknown, positions = torch.full_like(labels, -1), torch.arange(own.start, own.stop)
        return PKBatch(
            torch.from_numpy(images), labels, unknown, unknown, positions, labels, torch.from_numpy(identities), 1, step
        )

    def next_batch(self) -> Any:
        self.taken += 1
        return self.batch(self.taken)

    def step(self, batch: Any) -> dict[str, float]:
        """One, as `cluster.training.loop` takes it. Returns the losses of the global batch."""
        self.engine.remember_buffers()
        losses = self.stage.losses(batch)
        reduction = StepReduction(self.team, losses, Requests(False, False, False, False))
        self.engine.backward(losses["loss"])
        means, _ = reduction.wait()
        self.engine.step()
        return means

    def table_bytes(self) -> int:
        """Of the whole tables that the ranks hold in this stage: values, and two moments of those that learn."""
        held = [*self.models.tables, *([self.texts] if self.texts else [])]
        learning = {id(table.table) for table in self.engine.tables}
        return sum(table.num_identities * table.row_numel * 4 * (3 if id(table) in learning else 1) for table in held)


class Stage2OfMadeUpImages(Stage2):
    """Stage 2 without a dataset to load from."""

    def _loader(self, index: Any) -> PKLoader:
        return cast(PKLoader, None)


def _split(identities: int) -> SimpleNamespace:
    """A training split with one image of each identity, as far as a stage looks at one."""
    return SimpleNamespace(labels=np.arange(identities), num_identities=identities, label_names=range(identities))


def measure(team: Team, case: Case, num_steps: int) -> dict[str, Any]:
    """On one rank: the median of `num_steps` steps in seconds, the bytes it sends in one by kind, its peak memory."""
    steps = Steps(case, team)
    for _ in range(WARM_UP_STEPS):
        steps.step(steps.next_batch())
    with Traffic() as traffic:
        for _ in range(COUNTED_STEPS if team.world_size > 1 else 0):  # One rank sends nothing.
            steps.step(steps.next_batch())
    durations = [_seconds(steps) for _ in range(num_steps)]
    return {
        "step_s": statistics.median(durations),
        "fastest_step_s": min(durations),
        "sent_bytes": traffic.sent_bytes / COUNTED_STEPS,
        "bytes": {kind: count / COUNTED_STEPS for kind, count in traffic.bytes.items()},
        "calls": {kind: count / COUNTED_STEPS for kind, count in traffic.calls.items()},
        "peak_memory_bytes": peak_memory_bytes(team.device),
        "table_bytes": steps.table_bytes(),
        "learning_bytes": 4 * sum(table.numel for table in steps.engine.tables),
    }


def flops(team: Team, case: Case) -> int:
    """Of the matrix products and convolutions of one step, forward and backward, of one rank."""
    steps = Steps(case, team)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # Unfused, its products are seen.
        steps.step(steps.next_batch())
    return counter.get_total_flops()


def _seconds(steps: Steps) -> float:
    """Of one step, which ends when its losses are on the host and its update is done."""
    batch = steps.next_batch()
    start = time.perf_counter()
    steps.step(batch)
    if steps.team.device.type == "cuda":
        torch.cuda.synchronize(steps.team.device)
    return time.perf_counter() - start


def peak_memory_bytes(device: torch.device) -> int:
    """Most that this process has held so far: on a GPU its tensors, else all of it (VmHWM)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
