"""Checkpoints that any number of workers can go on from: the newest one found, read, and which ones are kept.

    RUN/checkpoints/ ──▶ [find_newest ──▶ Checkpoint.read] ──▶ engine
    checkpoint_writer.py ── a checkpoint is complete ──▶ [Retention] ──▶ older ones are removed

Every rank reads the pieces of all ranks that wrote, so their number does not matter.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor, nn

from clipreid.weights.card import read_metadata
from cluster.errors import ConfigError, TrainingError
from cluster.ranks.team import Team
from cluster.run.manifest import (
    FOLDER,
    CheckpointManifest,
    Fault,
    Position,
    chosen_manifest,
    find_fault,
    none_usable,
    read_manifests,
)
from cluster.run.storage import Storage
from cluster.training.engine import MOMENTS, Engine

log = logging.getLogger(__name__)
KEYS = ("value", *MOMENTS)
"""What a checkpoint holds of each trained parameter."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and what its manifest says."""

    folder: Storage
    manifest: CheckpointManifest

    @property
    def position(self) -> Position:
        return self.manifest.position

    def load(self, engine: Engine, team: Team) -> None:
        """Put it into this rank's engine: values, moments, step count and buffers. Raises TrainingError as `read`."""
        engine.load(self.read(engine.module), self.position.step, team.rank)

    @torch.no_grad()
    def read(self, module: nn.Module) -> dict[str, dict[str, Tensor]]:
        """All ranks' pieces put together, per trained parameter and key flat float32; buffers go into the module.

        Raises TrainingError where they are not the pieces of this module's parameters.
        """
        numels = {n: p.numel() for n, p in module.named_parameters() if p.requires_grad}
        full = {n: {key: torch.empty(numel) for key in KEYS} for n, numel in numels.items()}
        held: Counter[str] = Counter()
        buffers = dict(kept_buffers(module))
        for name in self.manifest.files:
            content = self.folder.read(name)
            starts = read_metadata(content)["starts"]
            for key, tensor in parse_safetensors(content).items():
                kind, parameter = key.split("/", 1)
                if kind == "buffer":
                    buffers[parameter].copy_(tensor)
                    continue
                held[parameter] += tensor.numel() if kind == "value" else 0
                start, end = starts[parameter], starts[parameter] + tensor.numel()
                if end <= numels.get(parameter, 0):
                    full[parameter][kind][start:end] = tensor
        for parameter in held.keys() | numels.keys():
            if held[parameter] != (needed := numels.get(parameter, 0)):
                raise TrainingError(
                    f"checkpoint {self.folder.url} holds {held[parameter]} elements of {parameter}, the model has "
                    f"{needed}: it is of another model"
                )
        return full


class Search(NamedTuple):
    """What a run found when it looked for a checkpoint to go on from."""

    checkpoint: Checkpoint | None
    passed_over: dict[str, Fault]
    """Checkpoints of the run, by their folder, that cannot be used: newer ones, and those with a bad manifest."""

    def own(self, run: Storage) -> CheckpointManifest | None:
        """The checkpoint where it is one of the run's own, and not another's that `run.resume` names."""
        if self.checkpoint and self.checkpoint.folder.url.startswith(run.place(FOLDER) + "/"):
            return self.checkpoint.manifest
        return None


def find_newest(run: Storage, team: Team, resume: str = "auto") -> Search:
    """The newest complete and undamaged checkpoint of the run; while it has none, the one whose path is `resume`. The
    same on every rank.

    Raises ConfigError where the run has checkpoints and none of them can be used, or the named one cannot.
    """
    return team.on_first(lambda: _search(run, resume), "choose a checkpoint")


def _search(run: Storage, resume: str) -> Search:
    manifests, passed_over = read_manifests(run)
    while manifests:
        manifest = manifests.pop()
        folder = Storage(run.place(f"{FOLDER}/{manifest.name}"))
        fault = find_fault(folder, manifest)
        if fault is None:
            for name, fault in passed_over.items():
                log.warning("%s: checkpoint %s is skipped", fault.text, name)
            return Search(Checkpoint(folder, manifest), passed_over)
        passed_over[manifest.name] = fault
    if passed_over:
        raise none_usable(run, (fault.text for fault in passed_over.values()))
    if resume in ("auto", "never"):
        return Search(None, passed_over)
    chosen = Checkpoint(Storage(resume), chosen_manifest(resume))
    if fault := find_fault(chosen.folder, chosen.manifest):
        raise ConfigError(f"run.resume: {fault.text}: choose another checkpoint")
    return Search(chosen, passed_over)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep`, the best by mAP, and those that are only out of reach."""

    keep: int
    passed_over: Mapping[str, Fault] = field(default_factory=dict)
    """As in `Search`. The damaged ones go."""

    def removable(self, run: Storage) -> list[str]:
        """Folders that may go, those of interrupted writes among them."""
        manifests, faults = read_manifests(run)
        manifests = [m for m in manifests if m.name not in self.passed_over]
        kept = {m.name for m in manifests[-self.keep :]}
        kept |= {name for name, fault in {**faults, **self.passed_over}.items() if not fault.damaged}
        evaluated = [(m.mAP, m.position, m.name) for m in manifests if m.mAP is not None]
        if evaluated:
            kept.add(max(evaluated, key=lambda entry: entry[:2])[-1])
        return [name for name in run.names(FOLDER) if name not in kept]


def kept_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Running statistics and their like: the buffers that a state_dict holds."""
    state = module.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in module.named_buffers() if name in state]
