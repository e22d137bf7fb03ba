"""Each run of the study by the commands that a user would call, several at a time; what is finished stays.

    plan ──▶ [runner: pack.py, train.py, evaluate.py] ──▶ run folders with metrics.json and queries.csv

A stopped study is repeated with the same command: runs that are done are passed over, and one that was stopped goes on
from its checkpoint.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError
from launch.study.plan import DESCRIPTORS, PlannedRun, slug
from shards.format import DATASET_FILE
from shards.storage import write_json

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/claims.yaml"
IDENTITIES, CAMERAS, IMAGES = 200, 6, 20


@dataclass(frozen=True)
class Study:
    """Where it lies and what all its runs have in common."""

    folder: Path
    """Of run folders and logs."""
    shards: Path
    overrides: tuple[str, ...] = ()
    """Settings beside `configs/claims.yaml`, for all runs."""

    def run_folder(self, run: PlannedRun) -> Path:
        return self.folder / run.folder

    def queries(self, run: PlannedRun, descriptor: str = "") -> Path:
        """Of a finished evaluation: a line for each query."""
        return self.run_folder(run) / f"queries{f'-{slug(descriptor)}' if descriptor else ''}.csv"


def claim_folder(study: Study, data_seed: int) -> None:
    """Make the study's folder, for these vehicles and settings alone. Raises ConfigError where it is of others."""
    wanted = {"data_seed": data_seed, "overrides": sorted(study.overrides)}
    file = study.folder / "study.json"
    if file.exists() and (found := json.loads(file.read_text())) != wanted:
        raise ConfigError(f"--out {study.folder}: is a study with {found}, not {wanted}: give another --out")
    study.folder.mkdir(parents=True, exist_ok=True)
    write_json(str(file), wanted)


def make_dataset(study: Study, seed: int) -> None:
    """Render and pack the vehicles of that seed, with cameras and views. Raises ConfigError."""
    if (study.shards / DATASET_FILE).exists():
        return
    images, log = study.shards.with_name("images"), study.folder / "dataset.log"
    sizes = ["--identities", IDENTITIES, "--cameras", CAMERAS, "--images", IMAGES]
    call(["pack.py", "render", "--out", images, *sizes, "--seed", seed], log)
    views = [images / "keypoint_train.txt", images / "keypoint_test.txt"]
    source = ["--dataset", "veri776", "--root", images, "--views", *views, "--noun", "vehicle"]
    call(["pack.py", "build", *source, "--out", study.shards], log)


def run_all(study: Study, runs: Sequence[PlannedRun], jobs: int, tell: Callable[[int, int, PlannedRun], None]) -> None:
    """All runs that are not finished, `jobs` at a time, each on one core. tell(done, of all, run) after each.

    Raises ConfigError, which names its log, for the first that fails; those that run then are ended as they end.
    """
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(_run, study, run): run for run in runs}
        try:
            for done, future in enumerate(as_completed(running), 1):
                future.result()
                tell(done, len(runs), running[future])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _run(study: Study, run: PlannedRun) -> None:
    folder = study.run_folder(run)
    wanted = [descriptor for descriptor in ("", *run.descriptors) if not _is_there(study.queries(run, descriptor))]
    if not wanted:
        return
    log = folder.with_suffix(".log")
    settings = [f"data.shards={study.shards}", f"run.dir={folder}", *run.settings, *study.overrides]
    call(["train.py", "--config", ROOT / CONFIG, *settings], log)
    for descriptor in wanted:
        chosen = [f"eval.descriptor={DESCRIPTORS[descriptor]}"] if descriptor else []
        queries = study.queries(run, descriptor)
        out = ["--per-query", queries, "--out", queries.with_suffix(".json")]
        call(["evaluate.py", "--weights", folder, *chosen, *out], log)


def _is_there(queries: Path) -> bool:
    """Whether an evaluation is whole: it writes a line for each query, and then its metrics."""
    return queries.exists() and queries.with_suffix(".json").exists()


def raw_weights(study: Study) -> Path:
    """The file that all runs start from. Raises ConfigError where there is none."""
    from cluster.settings.paths import shipped_file
    from cluster.settings.yaml_file import load_config

    pretrained = load_config(ROOT / CONFIG, study.overrides).model.pretrained
    if pretrained is None:
        raise ConfigError(f"{CONFIG}: model.pretrained is null: the study is of what starts from CLIP")
    path = Path(shipped_file(pretrained))
    if not path.is_file():
        raise ConfigError(f"model.pretrained {path}: no such file, and the study starts from it: see docs/claims.md")
    return path


def evaluate_raw(study: Study, weights: Path, queries: Path) -> None:
    """The weights that all runs start from, as they are. Raises ConfigError."""
    if _is_there(queries):
        return
    queries.parent.mkdir(parents=True, exist_ok=True)
    settings = [f"data.shards={study.shards}", *study.overrides]
    out = ["--per-query", queries, "--out", queries.with_suffix(".json")]
    call(["evaluate.py", "--config", ROOT / CONFIG, "--weights", weights, *settings, *out], study.folder / "raw.log")


def call(words: Sequence[object], log: Path) -> None:
    """One of the project's commands on one thread, its output in a log. Raises ConfigError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    script, *arguments = map(str, words)
    with log.open("a") as out:
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch" / script), *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "no output")
        raise ConfigError(f"{script} ended with {done.returncode} ({last}); see {log}; the same command goes on")
