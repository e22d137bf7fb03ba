"""Checkpoints that any number of workers can go on from: the newest one found, read, and which ones are kept.

    RUN/checkpoints/ ──▶ [find_newest ──▶ Checkpoint.read] ──▶ engine
    checkpoint_writer.py ── a checkpoint is complete ──▶ [Retention] ──▶ older ones are removed

Every rank reads from all ranks' files what belongs to it, so it does not matter how many wrote.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, NamedTuple

import torch
from torch import Tensor

from clipreid.weights.types import DTYPES
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
from cluster.training.engine import Engine
from cluster.training.pieces import Slot

log = logging.getLogger(__name__)
READ_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and what its manifest says."""

    folder: Storage
    manifest: CheckpointManifest

    @property
    def position(self) -> Position:
        return self.manifest.position

    def load(self, engine: Engine, team: Team) -> None:
        """Put it into this rank's engine: values, moments, step count and buffers. Raises TrainingError where it holds
        another model's parameters."""
        buffers = engine.replicated.buffers() if engine.replicated else {}
        held = self._fill(engine.slots(team.rank), buffers)
        numels = engine.numels()
        for parameter in held.keys() | numels.keys():
            if held[parameter] != (needed := numels.get(parameter, 0)):
                raise TrainingError(
                    f"checkpoint {self.folder.url} holds {held[parameter]} elements of {parameter}, the model has "
                    f"{needed}: it is of another model"
                )
        engine.loaded(self.position.step)

    def load_values(self, values: dict[str, Slot]) -> None:
        """Fill these with values of parameters, by name."""
        self._fill({(name, "value"): [slot] for name, slot in values.items()}, {})

    @torch.no_grad()
    def _fill(self, slots: Mapping[tuple[str, str], list[Slot]], buffers: Mapping[str, Tensor]) -> Counter[str]:
        """Read from every rank's file what belongs here. Returns the elements that the files hold of each parameter."""
        held: Counter[str] = Counter()
        for name in self.manifest.files:
            with self.folder.open(name) as file:
                pieces = PieceFile(file)
                for tensor, (start, numel) in pieces.flat.items():
                    kind, parameter = tensor.split("/", 1)
                    if kind == "buffer" and parameter in buffers:
                        pieces.copy(tensor, 0, buffers[parameter].view(-1))
                    held[parameter] += numel if kind == "value" else 0
                    for slot in slots.get((parameter, kind), []):
                        if both := slot.overlap(start, numel):
                            first, last = both
                            pieces.copy(tensor, first - start, slot.tensor[first - slot.start : last - slot.start])
        return held


class PieceFile:
    """One rank's file of a checkpoint, open for reading: only what is asked for is read."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        length = int.from_bytes(file.read(8), "little")
        self._header = json.loads(file.read(length))
        self._begin = 8 + length
        starts = json.loads(self._header.pop("__metadata__")["starts"])
        self.flat: dict[str, tuple[int, int]] = {
            name: (starts.get(name.split("/", 1)[1], 0), math.prod(facts["shape"]))
            for name, facts in self._header.items()
        }
        """Of each tensor, the first element in its parameter, and how many there are."""

    def copy(self, name: str, first: int, target: Tensor) -> None:
        """Elements from `first` on of a tensor into all of `target`, flat."""
        dtype = DTYPES[self._header[name]["dtype"]]
        at = self._begin + self._header[name]["data_offsets"][0] + first * dtype.itemsize
        self._file.seek(at)
        for part in target.split(READ_ELEMENTS):
            part.copy_(torch.frombuffer(bytearray(self._file.read(part.numel() * dtype.itemsize)), dtype=dtype))


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
