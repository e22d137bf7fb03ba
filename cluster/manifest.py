"""Which checkpoints of a run are complete, and whether a configuration may go on from one.

A checkpoint is a folder; its `manifest.json` is written last, so a folder without one does not count.
Imports no torch: these checks run before any worker starts.

    checkpoints/stage2-00000120-a3/rank-0-of-2.safetensors …  manifest.json
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from cluster.config import Config, results_settings
from cluster.errors import ConfigError
from cluster.storage import Storage

FORMAT = 1
FOLDER = "checkpoints"


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


def read_manifests(run: Storage) -> tuple[list[Manifest], list[str]]:
    """Complete checkpoints, oldest first, and one line for each manifest that cannot be read."""
    manifests, damaged = [], []
    for name in run.names(FOLDER):
        if "manifest.json" not in run.names(f"{FOLDER}/{name}"):
            continue
        try:
            manifests.append(Manifest.parse(run.read_json(f"{FOLDER}/{name}/manifest.json")))
        except (ValueError, TypeError, KeyError) as error:
            damaged.append(f"{run.url}/{FOLDER}/{name}/manifest.json is damaged ({error}): skipped")
    return sorted(manifests, key=lambda m: m.position), damaged


def find_fault(run: Storage, manifest: Manifest) -> str | None:
    """Compare every file with the manifest's size and hash. None, or a line that names the damaged file."""
    for name, facts in manifest.files.items():
        place = f"{FOLDER}/{manifest.name}/{name}"
        try:
            content = run.read(place)
        except OSError as error:
            return f"{run.url}/{place} cannot be read ({error.strerror or error})"
        if len(content) != facts["size"]:
            return f"{run.url}/{place} holds {len(content)} bytes, not {facts['size']}"
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            return f"{run.url}/{place} does not have the hash of its manifest"
    return None


def check_may_continue(config: Config, fingerprint: str) -> None:
    """Refuse to go on from checkpoints of another dataset or with settings that change results.

    Raises:
        ConfigError: one line per differing key, or for `run.resume: never` and a folder that has checkpoints.
    """
    run = Storage(config.run.dir)
    manifests, _ = read_manifests(run)
    if config.run.resume not in ("auto", "never"):
        manifests = [chosen_manifest(config)]
    if not manifests:
        return
    newest = manifests[-1]
    if config.run.resume == "never":
        raise ConfigError(
            f"run.resume: never, but {run.url} holds checkpoints up to {newest.name}: choose another run.dir, "
            "or run.resume=auto to go on from it"
        )
    faults = []
    if newest.fingerprint != fingerprint:
        faults.append(
            f"data.shards: {config.data.shards} is dataset {fingerprint}, the checkpoints of {run.url} are of "
            f"{newest.fingerprint}: use that dataset, or another run.dir"
        )
    now = json.loads(json.dumps(results_settings(config)))
    for key in sorted(now.keys() | newest.settings.keys()):
        before, after = newest.settings.get(key), now.get(key)
        if before != after:
            faults.append(f"{key}: {after}, but the checkpoints of {run.url} were made with {before}")
    if faults:
        raise ConfigError("\n".join([*faults, "such changes would change results: undo them, or use another run.dir"]))


def chosen_manifest(config: Config) -> Manifest:
    """The manifest of the checkpoint that run.resume names. Raises ConfigError where there is none."""
    folder = Storage(config.run.resume)
    if not folder.exists("manifest.json"):
        raise ConfigError(
            f"run.resume: {config.run.resume} is neither auto, never, nor a complete checkpoint "
            f"(a folder with manifest.json, as in {config.run.dir}/{FOLDER})"
        )
    return Manifest.parse(folder.read_json("manifest.json"))
