"""Which checkpoints of a run are complete, and what their manifests say.

    checkpoints/stage2-00000120-a3/rank-0-of-2.safetensors … manifest.json ──▶ [manifest] ──▶ checks, find_newest

A checkpoint is a folder; its `manifest.json` is written last, so a folder without one does not count.
Imports no torch: manifests are read before any worker starts.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from cluster.errors import ConfigError
from cluster.run.storage import Storage

FORMAT = 1
FOLDER = "checkpoints"
UNREADABLE = (OSError, ValueError, TypeError, KeyError)


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
        """Raises ValueError, TypeError or KeyError for a tree that `dump` did not make."""
        if tree.get("format") != FORMAT:
            raise ValueError(f"format {tree.get('format')}, this version reads {FORMAT}")
        position = Position(*(tree["position"][KEYS_ON_DISK.get(name, name)] for name in Position._fields))
        return cls(**tree | {"position": position})


def read_manifests(run: Storage) -> tuple[list[CheckpointManifest], dict[str, str]]:
    """Complete checkpoints, oldest first; and what is wrong with each manifest that cannot be read, by its folder."""
    manifests, faults = [], {}
    for name in run.names(FOLDER):
        if "manifest.json" not in run.names(f"{FOLDER}/{name}"):
            continue
        try:
            manifests.append(CheckpointManifest.parse(run.read_json(f"{FOLDER}/{name}/manifest.json") | {"name": name}))
        except UNREADABLE as error:
            faults[name] = f"{run.url}/{FOLDER}/{name}/manifest.json cannot be read ({error})"
    return sorted(manifests, key=lambda m: m.position), faults


class Fault(NamedTuple):
    """What is wrong with a checkpoint."""

    text: str
    damaged: bool
    """Whether a file is known to be incomplete, and not only out of reach."""


def find_fault(folder: Storage, manifest: CheckpointManifest) -> Fault | None:
    """Compare every file of a checkpoint with its manifest's size and hash."""
    for name, facts in manifest.files.items():
        try:
            content = folder.read(name)
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            return Fault(f"{folder.place(name)} cannot be read ({error.strerror or error})", gone)
        if len(content) != facts["size"]:
            return Fault(f"{folder.place(name)} holds {len(content)} bytes, not {facts['size']}", True)
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
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
        return CheckpointManifest.parse(folder.read_json("manifest.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"run.resume: {path} is neither auto, never, nor a complete checkpoint (a folder with manifest.json, as "
            f"in RUN/{FOLDER})"
        ) from None
    except UNREADABLE as error:
        raise ConfigError(
            f"run.resume: {folder.url}/manifest.json cannot be read ({error}): choose another checkpoint"
        ) from None
