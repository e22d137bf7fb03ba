"""Which checkpoints of a run are complete, and what their manifests say.

    checkpoints/stage2-00000120-a3/rank-0-of-2.safetensors … manifest.json ──▶ [manifest] ──▶ checks, find_newest

A checkpoint is a folder; its `manifest.json` is written last, so a folder without one does not count. It holds a
checksum of every file, and of itself.
Imports no torch: manifests are read before any worker starts.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from cluster.errors import ConfigError
from cluster.run.storage import Storage
from shards.sealed import SealError

FORMAT = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
PIECE_BYTES = 1 << 24
"""Read at a time."""
UNREADABLE = (OSError, ValueError)


class Position(NamedTuple):
    """What is done: `epoch_step` steps of `epoch`, `step` steps of the stage. Epochs and steps count from 1."""

    stage: int
    epoch: int
    epoch_step: int
    step: int
    epoch_done: bool

    @property
    def words(self) -> str:
        return f"stage {self.stage}, epoch {self.epoch}, step {self.step}"


KEYS_ON_DISK = {"epoch_step": "step", "step": "total"}
"""Fields of a position whose key in manifest.json is another: so they were called when the format was fixed."""


@dataclass
class CheckpointManifest:
    """The contents of a checkpoint's manifest.json."""

    name: str
    position: Position
    world_size: int
    zero_stage: int
    settings: dict[str, Any]
    fingerprint: str
    files: dict[str, dict[str, Any]]
    """Per file name its sha256 and size in bytes."""
    mAP: float | None = None
    encoder: str = ""
    """Identifies the image encoder's weights that the run began with."""
    format: int = FORMAT

    def dump(self) -> dict[str, Any]:
        position = {KEYS_ON_DISK.get(name, name): value for name, value in self.position._asdict().items()}
        return asdict(self) | {"position": position}

    @classmethod
    def parse(cls, tree: dict[str, Any]) -> "CheckpointManifest":
        """Raises OtherFormat, or SealError for a tree that `dump` did not make."""
        if tree.get("format") != FORMAT:
            raise OtherFormat(f"format {tree.get('format')}, this version reads {FORMAT}")
        for name, kind in _TYPES.items():
            if name not in tree or type(tree[name]) is not kind:
                raise SealError(f"{name} is {tree.get(name)!r}, not of type {kind.__name__}")
        on_disk = {name: tree["position"].get(KEYS_ON_DISK.get(name, name)) for name in Position._fields}
        if [type(value) for value in on_disk.values()] != [int, int, int, int, bool]:
            raise SealError(f"position is {tree['position']!r}")
        for file, facts in tree["files"].items():
            if not isinstance(facts, dict) or type(facts.get("size")) is not int or "sha256" not in facts:
                raise SealError(f"{file} is {facts!r}, without its size or hash")
        if unknown := tree.keys() - {field.name for field in fields(cls)}:
            raise SealError(f"has unknown {', '.join(sorted(unknown))}")
        return cls(**tree | {"position": Position(**on_disk)})


_TYPES = {
    "name": str,
    "position": dict,
    "world_size": int,
    "zero_stage": int,
    "settings": dict,
    "fingerprint": str,
    "files": dict,
}


class OtherFormat(ValueError):
    """A manifest of another version."""


class Fault(NamedTuple):
    """What is wrong with a checkpoint."""

    text: str
    damaged: bool
    """Whether a file is known not to be what was written, and not only out of reach or of another version."""


def read_manifest(folder: Storage) -> CheckpointManifest:
    """Of one checkpoint. Raises OSError, OtherFormat, or SealError where it is not as it was written."""
    return CheckpointManifest.parse(folder.read_sealed(MANIFEST))


def read_manifests(run: Storage) -> tuple[list[CheckpointManifest], dict[str, Fault]]:
    """Complete checkpoints, oldest first; and what is wrong with each manifest that cannot be read, by its folder."""
    manifests, faults = [], {}
    for name in run.names(FOLDER):
        if MANIFEST not in run.names(f"{FOLDER}/{name}"):
            continue
        folder = Storage(run.place(f"{FOLDER}/{name}"))
        try:
            manifests.append(replace(read_manifest(folder), name=name))
        except UNREADABLE as error:
            damaged = isinstance(error, SealError)
            faults[name] = Fault(f"{folder.url}/{MANIFEST} cannot be read ({error})", damaged)
    return sorted(manifests, key=lambda m: m.position), faults


def find_fault(folder: Storage, manifest: CheckpointManifest) -> Fault | None:
    """Compare every file of a checkpoint with its manifest's size and hash."""
    for name, facts in manifest.files.items():
        try:
            with folder.open(name) as file:
                digest, size = hashlib.sha256(), 0
                while piece := file.read(PIECE_BYTES):
                    digest.update(piece)
                    size += len(piece)
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            return Fault(f"{folder.place(name)} cannot be read ({error.strerror or error})", gone)
        if size != facts["size"]:
            return Fault(f"{folder.place(name)} holds {size} bytes, not {facts['size']}", True)
        if digest.hexdigest() != facts["sha256"]:
            return Fault(f"{folder.place(name)} does not have the hash of its manifest", True)
    return None


def none_usable(run: Storage, faults: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"run.dir: {run.url} has checkpoints, but none can be used ({'; '.join(faults)}): choose another run.dir, or "
        f"remove {run.place(FOLDER)} to begin anew"
    )


def chosen_manifest(path: str) -> CheckpointManifest:
    """The manifest of the checkpoint that run.resume names. Raises ConfigError where there is none."""
    folder = Storage(path)
    try:
        return read_manifest(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"run.resume: {path} is neither auto, never, nor a complete checkpoint (a folder with manifest.json, as "
            f"in RUN/{FOLDER})"
        ) from None
    except UNREADABLE as error:
        raise ConfigError(
            f"run.resume: {folder.url}/manifest.json cannot be read ({error}): choose another checkpoint"
        ) from None
