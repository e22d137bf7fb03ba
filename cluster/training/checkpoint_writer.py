"""Checkpoints written beside training.

    engine ── pieces ──▶ [save: copy now, write in a thread] ──▶ RUN/checkpoints/NAME/ … manifest.json

Every rank writes its own pieces. Rank 0 waits for all of them, writes the manifest last, and only then removes older
checkpoints. Training waits for the copy, and for the write before if that has not ended. Identity tables may fill most
of the memory, so they are not copied: they are written as they are, and the next update waits for that. Ranks fail
together.
"""

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from clipreid.weights.sealed import dump
from clipreid.weights.types import stored
from cluster.errors import TrainingError
from cluster.ranks.team import PATIENCE, Team
from cluster.run.manifest import FOLDER, MANIFEST, CheckpointManifest, Position
from cluster.run.storage import Storage
from cluster.training.checkpoint import Retention
from cluster.training.engine import Engine
from cluster.training.host_copy import HostCopy
from cluster.training.pieces import KEYS, Piece

STORAGE_REMEDY = "make room or mend the storage, then repeat the command"
NOT_FINITE_REMEDY = (
    "a gradient was not finite, so the same command would come to the same end; in another run.dir a smaller "
    "learning rate or train.precision=float32 may help"
)


@dataclass(frozen=True)
class Origin:
    """What every checkpoint of a run says of where it comes from; the fields are those of `CheckpointManifest`."""

    settings: dict[str, Any]
    fingerprint: str
    encoder: str = ""


@dataclass
class _Write:
    """A write under way on this rank."""

    manifest: CheckpointManifest
    starts: dict[str, int] | None
    """First element of this rank's piece, by parameter; None where the pieces are there already."""
    live: dict[str, Tensor] = field(default_factory=dict)
    """Memory of tables, which is written as it is."""
    thread: threading.Thread | None = None
    piece_done: threading.Event = field(default_factory=threading.Event)


class CheckpointWriter:
    """Writes the checkpoints of one run, as one rank of it."""

    def __init__(
        self,
        run: Storage,
        team: Team,
        origin: Origin,
        retention: Retention,
        *,
        timeout_s: float,
        newest: CheckpointManifest | None = None,
    ):
        """newest: of the run's complete checkpoints."""
        self.run, self.team, self.origin, self.retention = run, team, origin, retention
        self.timeout_s = timeout_s
        self._attempt = team.broadcast_object(f"{time.time_ns() // 1_000_000:x}", "name checkpoints")
        self._complete = newest
        """The newest checkpoint that is known to be complete, on every rank since its `finish`."""
        self._complete_name = newest.name if newest else None
        """Its name, on rank 0 as soon as its manifest is written."""
        self._copy = HostCopy()
        self._write: _Write | None = None
        self._failure: tuple[str, str] | None = None
        """What is wrong, and the remedy."""

    @property
    def failed(self) -> bool:
        """Whether this rank's write in the background has failed."""
        return self._failure is not None

    def save(self, position: Position, engine: Engine, *, mAP: float | None = None) -> None:
        """Copy this rank's state and write it in the background; of a complete checkpoint of the same step only the
        manifest, and nothing where that says as much. All ranks call this together. Raises TrainingError where the
        write before this one failed."""
        self.finish()
        manifest = self._manifest(position, engine, mAP)
        if self._complete is None or not _same_step(self._complete.position, position):
            self._start(self._begin(manifest, engine))
        elif position.epoch_done and not self._complete.position.epoch_done:
            self._start(_Write(replace(self._complete, position=position, mAP=mAP), None))

    def _start(self, write: _Write) -> None:
        self._write = write
        write.thread = threading.Thread(target=self._work, args=(write,), daemon=True)
        write.thread.start()

    def _begin(self, manifest: CheckpointManifest, engine: Engine) -> _Write:
        """Copies of this rank's pieces of what is replicated are on their way."""
        tables = [table.piece() for table in engine.tables]
        copied: list[Piece] = []
        buffers: dict[str, Tensor] = {}
        if engine.replicated is not None:
            copied = list(engine.replicated.pieces(self.team.rank))
            buffers = engine.replicated.buffers() if self.team.is_first else {}
        self._copy.take(_by_key(copied) | {f"buffer/{name}": buffer for name, buffer in buffers.items()})
        return _Write(manifest, {piece.name: piece.start for piece in (*copied, *tables)}, _by_key(tables))

    def before_update(self) -> None:
        """Wait until no table is being written, on any rank. All ranks call this together, before each update."""
        write = self._write
        if write is None or not write.live:
            return
        with self.team.within("write the tables", PATIENCE):
            write.piece_done.wait(self.timeout_s)
        self._check_in_time(write.piece_done.is_set())
        self.team.barrier("write the tables")
        write.live = {}

    def _manifest(self, position: Position, engine: Engine, mAP: float | None) -> CheckpointManifest:
        return CheckpointManifest(
            name=f"stage{position.stage}-{position.step:08d}-{self._attempt}",
            position=position,
            world_size=self.team.world_size,
            zero_stage=engine.zero_stage,
            settings=self.origin.settings,
            fingerprint=self.origin.fingerprint,
            files={},
            mAP=mAP,
            encoder=self.origin.encoder,
        )

    def finish(self) -> None:
        """Wait for the write under way. All ranks call this together, and none waits for pieces that will not come.

        Raises TrainingError, on every rank, where the write failed on any or the state was not finite, with the remedy.
        """
        write = self._write
        if write is None or write.thread is None:
            return
        write.piece_done.wait(self.timeout_s)
        self._check_in_time(write.piece_done.is_set())
        self._fail_together(write)  # Before rank 0 waits for the other ranks' pieces.
        write.thread.join(2 * self.timeout_s)
        self._check_in_time(not write.thread.is_alive())
        self._fail_together(write)
        self._write = None
        self._complete = write.manifest

    def _check_in_time(self, done: bool) -> None:
        if not done:
            self._failure = f"rank {self.team.rank} is not done after {self.timeout_s:g} s", STORAGE_REMEDY

    def _fail_together(self, write: _Write) -> None:
        outcome = (self._failure, self._complete_name)
        outcomes = self.team.all_gather_objects(outcome, "finish the checkpoint before")
        failures = [failure for failure, _ in outcomes if failure]
        if not failures:
            return
        if self.team.is_first and write.manifest.name != self._complete_name:
            with suppress(OSError):
                self.run.remove(f"{FOLDER}/{write.manifest.name}")  # Incomplete, it would only fill the storage.
        self._failure = self._write = None
        self.team.barrier("discard the incomplete checkpoint")
        faults, remedies = ("; ".join(dict.fromkeys(words)) for words in zip(*failures, strict=True))
        raise TrainingError(
            f"the checkpoint could not be written to {self.run.url}/{FOLDER} ({faults}); the one before it "
            f"({outcomes[0][1] or 'none'}) is intact: {remedies}"
        )

    def _work(self, write: _Write) -> None:
        """What the thread does."""
        manifest = write.manifest
        try:
            folder = f"{FOLDER}/{manifest.name}"
            if write.starts is not None:
                tensors = self._copy.arrive() | write.live
                if bad := _not_finite(tensors):
                    more = f" and {len(bad) - 1} more" if bad[1:] else ""
                    self._failure = f"{bad[0]}{more} not finite after {manifest.position.words}", NOT_FINITE_REMEDY
                    return
                self._write_pieces(folder, tensors, write.starts)
            write.piece_done.set()
            if self.team.is_first:
                if write.starts is not None:
                    manifest.files = self._facts_of_all_ranks(folder)
                self.run.write_sealed(f"{folder}/{MANIFEST}", manifest.dump())
                self._complete_name = manifest.name
                for name in self.retention.removable(self.run):
                    self.run.remove(f"{FOLDER}/{name}")
        except Exception as error:
            self._failure = str(error), STORAGE_REMEDY
        finally:
            write.piece_done.set()

    def _write_pieces(self, folder: str, tensors: dict[str, Tensor], starts: dict[str, int]) -> None:
        """This rank's file, and beside it its hash and size."""
        name = _file_name(self.team.rank, self.team.world_size)
        digest, size = hashlib.sha256(), 0

        def written() -> Iterator[bytes | memoryview]:
            nonlocal size
            content = {key: stored(tensor) for key, tensor in tensors.items()}
            for part in dump(content, {"starts": json.dumps(starts)}, sealed=False):
                digest.update(part)
                size += len(part)
                yield part

        self.run.write_pieces(f"{folder}/{name}", written())
        self.run.write_json(f"{folder}/{name}.json", {"sha256": digest.hexdigest(), "size": size})

    def _facts_of_all_ranks(self, folder: str) -> dict[str, dict[str, Any]]:
        files = [_file_name(rank, self.team.world_size) for rank in range(self.team.world_size)]
        until = time.monotonic() + self.timeout_s
        while missing := [f for f in files if f"{f}.json" not in self.run.names(folder)]:
            if time.monotonic() > until:
                raise TimeoutError(f"after {self.timeout_s:g} s these files are missing: {', '.join(missing)}")
            time.sleep(0.02)
        return {f: self.run.read_json(f"{folder}/{f}.json") for f in files}


def _by_key(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    return {f"{key}/{piece.name}": getattr(piece, key) for piece in pieces for key in KEYS}


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of tensors that hold NaN or an infinite number."""
    numbers = ((name, t) for name, t in tensors.items() if t.is_floating_point() and t.numel())
    return [name for name, t in numbers if not all(math.isfinite(end) for end in t.aminmax())]


def _same_step(one: Position, other: Position) -> bool:
    return (one.stage, one.step) == (other.stage, other.step)


def _file_name(rank: int, world_size: int) -> str:
    return f"rank-{rank}-of-{world_size}.safetensors"


class Due:
    """Whether a checkpoint is due: by steps and epochs on every rank alike, by the clock on the rank that is asked.

    What has become due stays `owed` until it is saved, so that whoever can save next does it, whatever the reason was.
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
        self.owed = False

    def by_clock(self) -> bool:
        return bool(self.every_s) and self.clock() - self.last_s > self.every_s

    def after_step(self, step: int, *, asked: bool) -> None:
        """A step is done. asked: the clock asked for a checkpoint, as far as all ranks know."""
        self.owed |= asked or bool(self.every_steps and step % self.every_steps == 0)

    def after_epoch(self, epoch: int, *, is_last: bool) -> None:
        """An epoch's steps are done. is_last: of its stage, whose end is always kept."""
        self.owed |= is_last or bool(self.every_epochs and epoch % self.every_epochs == 0)

    def saved(self) -> None:
        self.last_s, self.owed = self.clock(), False
