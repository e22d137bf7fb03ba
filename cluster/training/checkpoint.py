"""Checkpoints that any number of workers can go on from, written beside training.

    engine ── fragments ──▶ [save: copy now, write in a thread] ──▶ storage ──▶ [load] ──▶ engine

Every rank writes its own pieces. Rank 0 waits for all of them, writes the manifest last, and only then removes
older checkpoints. Training waits for the copy, and for the write before if that has not ended.
"""

import hashlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor, nn

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
from cluster.training.host_copy import HostCopy

log = logging.getLogger(__name__)
KEYS = ("value", *MOMENTS)
STORAGE_REMEDY = "make room or mend the storage, then repeat the command"
NOT_FINITE_REMEDY = (
    "a gradient was not finite, so the same command would come to the same end; in another run.dir a smaller "
    "learning rate or train.precision=float32 may help"
)


class Checkpoints:
    """The checkpoints of one run, as one rank sees them."""

    def __init__(
        self, run: Storage, team: Team, *, settings: dict, fingerprint: str, keep: int, timeout_s: float,
        encoder: str = "",
    ):  # fmt: skip
        self.run = run
        self.source: Storage | None = None
        """The folder of the checkpoint to go on from."""
        self.team = team
        self.settings = settings
        self.fingerprint = fingerprint
        self.encoder = encoder
        """Of the weights that the run began with, as in `CheckpointManifest`."""
        self.keep = keep
        self.timeout_s = timeout_s
        self.attempt = team.broadcast_object(f"{time.time_ns() // 1_000_000:x}", "name checkpoints")
        self.newest_name: str | None = None
        """Newest checkpoint known to be complete (rank 0 only)."""
        self.newest_position: Position | None = None
        """Its position, on every rank."""
        self.passed_over: dict[str, Fault] = {}
        """Of these the damaged ones go when the next checkpoint is complete (rank 0 only)."""
        self._copy = HostCopy()
        self._writer: threading.Thread | None = None
        self._writing: CheckpointManifest | None = None
        self._piece_done = threading.Event()
        self._failure: tuple[str, str] | None = None
        """What is wrong, and the remedy."""

    def save(self, position: Position, engine: Engine, *, mAP: float | None = None) -> None:
        """Copy this rank's state and write it in the background, unless a complete checkpoint has it. All ranks call
        this together.

        Raises:
            TrainingError: the write before this one failed.
        """
        self.finish()
        if self._is_saved(position):
            return
        name = f"stage{position.stage}-{position.step:08d}-{self.attempt}"
        tensors, starts = {}, {}
        for piece in engine.fragments(self.team.rank):
            starts[piece.name] = piece.start
            tensors |= {f"{key}/{piece.name}": getattr(piece, key) for key in KEYS}
        if self.team.is_first:
            tensors |= {f"buffer/{n}": b for n, b in _kept_buffers(engine.module)}
        self._copy.take(tensors)
        manifest = CheckpointManifest(
            name, position, self.team.world_size, engine.zero_stage, self.settings, self.fingerprint, {}, mAP,
            self.encoder,
        )  # fmt: skip
        self._writing = manifest
        self._piece_done.clear()
        self._writer = threading.Thread(target=self._write, args=(manifest, starts), daemon=True)
        self._writer.start()

    def finish(self) -> None:
        """Wait for the write under way. All ranks call this together, and none waits for pieces that will not come.

        Raises:
            TrainingError: on every rank, if the write failed on any or the state was not finite; it names the remedy.
        """
        if self._writer is None:
            return
        self._piece_done.wait(self.timeout_s)
        self._check_in_time(self._piece_done.is_set())
        self._fail_together()  # Before rank 0 waits for the other ranks' pieces.
        self._writer.join(2 * self.timeout_s)
        self._check_in_time(not self._writer.is_alive())
        self._fail_together()
        self._writer = None
        self.newest_position = self._writing.position

    def _check_in_time(self, done: bool) -> None:
        if not done:
            self._failure = f"rank {self.team.rank} is not done after {self.timeout_s:g} s", STORAGE_REMEDY

    def _is_saved(self, position: Position) -> bool:
        newest = self.newest_position
        if newest is None or (newest.stage, newest.step) != (position.stage, position.step):
            return False
        return newest.epoch_done or not position.epoch_done

    @property
    def failed(self) -> bool:
        """Whether this rank's write in the background has failed."""
        return self._failure is not None

    def _fail_together(self) -> None:
        news = (self._failure, self.newest_name)
        everyone = self.team.all_gather_objects(news, "finish the checkpoint before")
        failures = [failure for failure, _ in everyone if failure]
        if not failures:
            return
        if self.team.is_first and self._writing.name != self.newest_name:  # Incomplete, it would only fill the storage.
            with suppress(OSError):
                self.run.remove(f"{FOLDER}/{self._writing.name}")
        self._failure = self._writer = None
        self.team.barrier("discard the incomplete checkpoint")
        faults, remedies = ("; ".join(dict.fromkeys(parts)) for parts in zip(*failures, strict=True))
        raise TrainingError(
            f"the checkpoint could not be written to {self.run.url}/{FOLDER} ({faults}); the one before it "
            f"({everyone[0][1] or 'none'}) is intact: {remedies}"
        )

    def _write(self, manifest: CheckpointManifest, starts: dict[str, int]) -> None:
        try:
            self._copy.arrive()
            if bad := self._copy.not_finite():
                more = f" and {len(bad) - 1} more" if bad[1:] else ""
                self._failure = f"{bad[0]}{more} not finite after {manifest.position.words}", NOT_FINITE_REMEDY
                return
            folder = f"{FOLDER}/{manifest.name}"
            mine = _file_name(self.team.rank, self.team.world_size)
            parts = self._copy.safetensors({"starts": json.dumps(starts)})
            self.run.write(f"{folder}/{mine}", *parts)
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part)
            facts = {"sha256": digest.hexdigest(), "size": sum(map(len, parts))}
            self.run.write_json(f"{folder}/{mine}.json", facts)
            self._piece_done.set()
            if self.team.is_first:
                manifest.files = self._facts_of_all_ranks(folder)
                self.run.write_json(f"{folder}/manifest.json", manifest.dump())
                self.newest_name = manifest.name
                self._remove_old()
        except Exception as error:
            self._failure = str(error), STORAGE_REMEDY
        finally:
            self._piece_done.set()

    def _facts_of_all_ranks(self, folder: str) -> dict[str, dict]:
        files = [_file_name(rank, self.team.world_size) for rank in range(self.team.world_size)]
        until = time.monotonic() + self.timeout_s
        while missing := [f for f in files if f"{f}.json" not in self.run.names(folder)]:
            if time.monotonic() > until:
                raise TimeoutError(f"after {self.timeout_s:g} s these files are missing: {', '.join(missing)}")
            time.sleep(0.02)
        return {f: self.run.read_json(f"{folder}/{f}.json") for f in files}

    def _remove_old(self) -> None:
        """Keep the newest `keep` and the best by mAP; folders of interrupted writes go as well."""
        manifests, unreadable = read_manifests(self.run)
        manifests = [m for m in manifests if m.name not in self.passed_over]
        keep = {m.name for m in manifests[-self.keep :]} | unreadable.keys()
        keep |= {name for name, fault in self.passed_over.items() if not fault.damaged}
        scored = [m for m in manifests if m.mAP is not None]
        if scored:
            keep.add(max(scored, key=lambda m: (m.mAP, m.position)).name)
        for name in self.run.names(FOLDER):
            if name not in keep:
                self.run.remove(f"{FOLDER}/{name}")

    def newest(self, chosen: str = "auto") -> CheckpointManifest | None:
        """The newest complete and undamaged checkpoint; while the run has none, the one whose path is `chosen`. The
        same on every rank.

        Raises:
            ConfigError: the run has checkpoints and none of them can be used, or the chosen one cannot.
        """
        found, folder = self.team.on_first(lambda: self._find(chosen), "choose a checkpoint")
        if found is not None:
            self.source = Storage(folder)
            if folder.startswith(self.run.place(FOLDER) + "/"):
                self.newest_position = found.position
        return found

    def _find(self, chosen: str) -> tuple[CheckpointManifest | None, str]:
        """A checkpoint and its folder."""
        manifests, faults = read_manifests(self.run)
        while manifests:
            manifest = manifests.pop()
            folder = Storage(self.run.place(f"{FOLDER}/{manifest.name}"))
            fault = find_fault(folder, manifest)
            if fault is None:
                self.newest_name = manifest.name
                for name, text in faults.items():
                    log.warning("%s: checkpoint %s is skipped", text, name)
                return manifest, folder.url
            self.passed_over[manifest.name] = fault
            faults[manifest.name] = fault.text
        if faults:
            raise none_usable(self.run, faults.values())
        if chosen in ("auto", "never"):
            return None, ""
        manifest = chosen_manifest(chosen)
        if fault := find_fault(Storage(chosen), manifest):
            raise ConfigError(f"run.resume: {fault.text}: choose another checkpoint")
        return manifest, chosen

    def load(self, manifest: CheckpointManifest, engine: Engine) -> None:
        """Put a checkpoint of any world size into this rank's engine: values, moments, step count and buffers.

        Raises:
            TrainingError: it is of another model, or its pieces do not cover a parameter.
        """
        engine.load(self.read(manifest, engine.module), manifest.position.step, self.team.rank)

    @torch.no_grad()
    def read(self, manifest: CheckpointManifest, module: nn.Module) -> dict[str, dict[str, Tensor]]:
        """All ranks' pieces put together, per trained parameter and key flat float32; buffers go into the module.

        Raises:
            TrainingError: they are not the pieces of this module's parameters.
        """
        parameters = {n: p.numel() for n, p in module.named_parameters() if p.requires_grad}
        full = {n: {key: torch.empty(numel) for key in KEYS} for n, numel in parameters.items()}
        held = Counter()
        buffers = dict(_kept_buffers(module))
        for name in manifest.files:
            content = self.source.read(name)
            starts = _metadata(content)["starts"]
            for key, tensor in parse_safetensors(content).items():
                kind, parameter = key.split("/", 1)
                if kind == "buffer":
                    buffers[parameter].copy_(tensor)
                    continue
                held[parameter] += tensor.numel() if kind == "value" else 0
                start, end = starts[parameter], starts[parameter] + tensor.numel()
                if end <= parameters.get(parameter, 0):
                    full[parameter][kind][start:end] = tensor
        for parameter in held.keys() | parameters.keys():
            if held[parameter] != (wanted := parameters.get(parameter, 0)):
                raise TrainingError(
                    f"checkpoint {self.source.url} holds {held[parameter]} elements of {parameter}, the model has "
                    f"{wanted}: it is of another model"
                )
        return full


def _kept_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Running statistics and their like: the buffers that a state_dict holds."""
    state = module.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in module.named_buffers() if name in state]


def _file_name(rank: int, world_size: int) -> str:
    return f"rank-{rank}-of-{world_size}.safetensors"


def _metadata(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    return {key: json.loads(value) for key, value in metadata.items()}


class Due:
    """When a checkpoint is due: by steps and epochs on every rank alike, by the clock on the rank that is asked.

    0 as interval: never for this reason.
    """

    def __init__(
        self,
        every_steps: int = 0,
        every_minutes: float = 0,
        every_epochs: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.every_steps = every_steps
        self.every_s = every_minutes * 60
        self.every_epochs = every_epochs
        self.clock = clock
        self.last_s = clock()

    def by_steps(self, step: int) -> bool:
        return bool(self.every_steps) and step % self.every_steps == 0

    def by_epochs(self, epoch: int) -> bool:
        return bool(self.every_epochs) and epoch % self.every_epochs == 0

    def by_clock(self) -> bool:
        return bool(self.every_s) and self.clock() - self.last_s > self.every_s

    def saved(self) -> None:
        self.last_s = self.clock()
