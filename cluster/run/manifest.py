"""Which checkpoints of a run are complete, and what their manifests say.

A checkpoint is a folder; its `manifest.json` is written last, so a folder without one does not count.
Imports no torch: manifests are read before any worker starts.

    checkpoints/stage2-00000120-a3/rank-0-of-2.safetensors …  manifest.json
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
    """What is done: `step` steps of `epoch`, `total` steps of the stage. Epochs and steps count from 1."""

    stage: int
    epoch: int
    step: int
    total: int
    epoch_done: bool

    @property
    def words(self) -> str:
        return f"stage {self.stage}, epoch {self.epoch}, step {self.total}"


@dataclass
class Manifest:
    """The contents of manifest.json."""

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
        return asdict(self) | {"position": self.position._asdict()}

    @classmethod
    def parse(cls, tree: dict[str, Any]) -> "Manifest":
        if tree.get("format") != FORMAT:
            raise ValueError(f"format {tree.get('format')}, this version reads {FORMAT}")
        return cls(**tree | {"position": Position(**tree["position"])})


def read_manifests(run: Storage) -> tuple[list[Manifest], dict[str, str]]:
    """Complete checkpoints, oldest first; and what is wrong with each manifest that cannot be read, by its folder."""
    manifests, faults = [], {}
    for name in run.names(FOLDER):
        if "manifest.json" not in run.names(f"{FOLDER}/{name}"):
            continue
        try:
            manifests.append(Manifest.parse(run.read_json(f"{FOLDER}/{name}/manifest.json") | {"name": name}))
        except UNREADABLE as error:
            faults[name] = f"{run.url}/{FOLDER}/{name}/manifest.json cannot be read ({error})"
    return sorted(manifests, key=lambda m: m.position), faults


class Fault(NamedTuple):
    """What is wrong with a checkpoint."""

    text: str
    damaged: bool
    """Whether a file is known to be incomplete, and not only out of reach."""


def find_fault(folder: Storage, manifest: Manifest) -> Fault | None:
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


def chosen_manifest(path: str) -> Manifest:
    """The manifest of the checkpoint that run.resume names. Raises ConfigError where there is none."""
    folder = Storage(path)
    try:
        return Manifest.parse(folder.read_json("manifest.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"run.resume: {path} is neither auto, never, nor a complete checkpoint (a folder with manifest.json, as "
            f"in RUN/{FOLDER})"
        ) from None
    except UNREADABLE as error:
        raise ConfigError(
            f"run.resume: {folder.url}/manifest.json cannot be read ({error}): choose another checkpoint"
        ) from None
