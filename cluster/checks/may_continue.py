"""Whether a run may go on from the checkpoints that are there: same dataset, and settings that give the same results.

    manifests of the run folder or of run.resume, Config ──▶ [may_continue] ──▶ nothing, or one ConfigError

Imports no torch: this is known before any worker starts.
"""

import json
from collections.abc import Iterator

from cluster.errors import ConfigError
from cluster.run.manifest import FOLDER, CheckpointManifest, chosen_manifest, none_usable, read_manifests
from cluster.run.storage import Storage
from cluster.settings.config import AUTO, STAGE1_EPOCHS, Config, results_settings
from cluster.settings.paths import as_placed


def check_may_continue(config: Config, fingerprint: str) -> None:
    """Refuse to go on from checkpoints of another dataset or with settings that change results.

    Raises ConfigError with one line per differing key, or for a `run.resume` that does not fit the folder's
    checkpoints.
    """
    run = Storage(config.run.dir)
    manifests, unreadable = read_manifests(run)
    if unreadable and not manifests:
        raise none_usable(run, (fault.text for fault in unreadable.values()))
    resume, source = config.run.resume, run.url
    if manifests:
        newest = manifests[-1]
        _check_resume(resume, run, newest)
    elif resume in ("auto", "never"):
        return
    else:
        newest, source = chosen_manifest(resume), resume
    faults = []
    if newest.fingerprint != fingerprint:
        faults.append(
            f"data.shards: {config.data.shards} is dataset {fingerprint}, the checkpoints of {source} are of "
            f"{newest.fingerprint}: use that dataset, or another run.dir"
        )
    faults += _setting_faults(config, newest, source)
    if faults:
        raise ConfigError("\n".join([*faults, "such changes would change results: undo them, or use another run.dir"]))


def _check_resume(resume: str, run: Storage, newest: CheckpointManifest) -> None:
    """Whether `run.resume` lets a run with checkpoints of its own go on from its newest one."""
    if resume == "never":
        raise ConfigError(
            f"run.resume: never, but {run.url} holds checkpoints up to {newest.name}: choose another run.dir, "
            "or run.resume=auto to go on from it"
        )
    folder, _, name = resume.rstrip("/").rpartition("/")
    if folder == run.place(FOLDER) and name != newest.name:
        raise ConfigError(
            f"run.resume: {resume} is not the newest checkpoint of this run.dir, which is {newest.name}: choose "
            "another run.dir to branch off from it, or run.resume=auto"
        )


def _setting_faults(config: Config, newest: CheckpointManifest, source: str) -> Iterator[str]:
    position = newest.position
    now = json.loads(json.dumps(results_settings(config)))
    for key in sorted(now.keys() | newest.settings.keys()):
        before, after = as_placed(key, newest.settings.get(key)), now.get(key)
        if key == "train.precision" and after == AUTO:
            continue  # It goes on in what it was begun with.
        if before != after and not (key == STAGE1_EPOCHS and position.stage == 2):
            yield f"{key}: {after}, but the checkpoints of {source} were made with {before}"
    if position.stage == 2 and config.stage2.epochs < position.epoch:
        yield (
            f"stage2.epochs: {config.stage2.epochs}, but {newest.name} of {source} is in epoch {position.epoch} "
            "already: set at least that"
        )
