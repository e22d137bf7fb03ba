"""One training run as its user sees it: facts first, progress while it works, a table and the run folder at the end.

    Config ──▶ [run] ──▶ Ray Train, or this process ──▶ worker.train ──▶ metrics.json in the run folder

This process is a worker itself under the launchers torchrun (one of its processes) and local (the only one).
"""

import logging
import os
import signal
import sys
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.table import Table

from clipreid.errors import ModelError
from clipreid.weights.card import MODEL_FILE
from clipreid.weights.sealed import check_file
from cluster.errors import ConfigError, Preempted, RankLost, TrainingError
from cluster.ranks.process import joined, threads_per_worker
from cluster.run.interrupts import stop_signals, withdraw_stop
from cluster.run.reporter import headline, run_identity
from cluster.run.run_folder import STAGE1_RESULT, read_metrics, read_status
from cluster.run.status_view import follow
from cluster.run.storage import Storage
from cluster.settings.config import Config, settled_forms
from shards.errors import masked
from shards.loading.index import ShardIndex
from shards.owner import owned_folder

log = logging.getLogger(__name__)
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT


def train_and_show(config: Config, index: ShardIndex, origin: str = "") -> int:
    """Train and print what came of it. origin: a line on what the model begins with, if any.

    The exit code: 0 when the work is done, 143 when SIGTERM and 130 when Ctrl-C stopped it.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=not is_first, highlight=False)
    console.print(f"{index.name}: {dataset_facts(index)}")
    if origin:
        console.print(masked(origin), soft_wrap=True)
    run_dir = Storage(config.run.dir)
    if is_finished(config):
        console.print(f"finished before: nothing to do in {masked(run_dir.url)}")
        metrics = read_metrics(run_dir)
    else:
        try:
            with ExitStack() as while_it_runs:
                if is_first:  # torchrun's other processes are of the same run.
                    while_it_runs.enter_context(owned_folder(config.run.dir, "training"))
                    while_it_runs.enter_context(follow(config.run.dir))
                metrics = run(config)
        except (TrainingError, RankLost) as error:
            print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
            return 1
        except Preempted as stop:
            if is_first:
                print(f"{stop}; run folder: {masked(run_dir.url)}", file=sys.stderr)
            return stop_signals.exit_code
        except KeyboardInterrupt:
            if is_first:
                print(f"interrupted; repeat the command to go on; run folder: {masked(run_dir.url)}", file=sys.stderr)
            return INTERRUPTED_EXIT_CODE
    if "untrained" in metrics:
        console.print(result_table(metrics))
    console.print(f"run folder: {masked(run_dir.url)}", soft_wrap=True)
    return 0


def run(config: Config) -> dict[str, Any]:
    """Train with the configured launcher; the metrics of metrics.json.

    Raises:
        ConfigError, TrainingError, DataError, ModelError: as the workers raised them.
        Preempted: on SIGTERM, after a checkpoint.
        RankLost: torchrun's other processes are gone; Ray Train starts them again instead.
    """
    if config.cluster.launcher == "ray":
        from cluster.launchers.ray import train_with_ray

        return train_with_ray(config)
    return train_in_this_process(config)


def train_in_this_process(config: Config) -> dict[str, Any]:
    """As one of torchrun's processes, or alone. Raises as `run`."""
    with joined(config.cluster.timeout_s, threads_per_worker(config.cluster)) as team:
        check_world_size(config, team.world_size)
        from cluster.training.worker import train

        team.on_first(lambda: withdraw_stop(config.run.dir), "withdraw an earlier request to stop")
        return train(config, team)


def check_world_size(config: Config, world_size: int) -> None:
    """Raises ConfigError where the launcher's number of workers does not divide the batch by whole identities."""
    if 2 in config.stages and world_size not in config.possible_workers():
        raise ConfigError(
            f"{world_size} workers do not divide stage2.identities {config.stage2.identities}; possible: "
            f"{config.possible_workers()}"
        )


def dataset_facts(index: ShardIndex) -> str:
    """ "train 1,200 images of 60 identities; query …; 6 cameras"."""
    splits = [f"{name} {s['images']:,} images of {s['identities']:,} identities" for name, s in index.splits.items()]
    return "; ".join([*splits, f"{index.cameras} cameras" if index.cameras else "no cameras"])


def is_finished(config: Config) -> bool:
    """Whether the run has ended, and its results are what it wrote: what is not is made again."""
    run = Storage(config.run.dir)
    status = read_status(run)
    forms = [run_identity(form) for form in settled_forms(config)]
    if status.get("phase") != "finished" or status.get("run") not in forms:
        return False
    return (
        _is_sound(run, MODEL_FILE) and bool(read_metrics(run)) if 2 in config.stages else _is_sound(run, STAGE1_RESULT)
    )


def _is_sound(run: Storage, name: str) -> bool:
    """A remote file is not fetched for it: object stores check what they keep."""
    if run.local_root is None:
        return run.exists(name)
    path = run.local_root / name
    try:
        with path.open("rb") as file:
            check_file(file, path.stat().st_size, str(path))
    except (FileNotFoundError, ModelError) as error:
        log.warning("%s: it is made again", error)
        return False
    return True


def result_table(metrics: dict[str, Any]) -> Table:
    """Percentages before and after training."""
    after, before = headline(metrics), headline(metrics["untrained"])
    table = Table("%", *after)
    for name, row in (("untrained", before), ("after stage 2", after)):
        table.add_row(name, *(f"{100 * value:.1f}" for value in row.values()))
    return table
