"""One training run as its user sees it: facts first, progress while it works, a table and the run folder at the end."""

import os
import sys
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.errors import RankLost, TrainingError
from cluster.launchers.ray import STOPPED_EXIT_CODE, Stopped, run
from cluster.run.reporter import headline, run_identity
from cluster.run.run_folder import read_metrics, read_status
from cluster.run.status_view import follow
from cluster.run.storage import Storage
from cluster.settings.config import Config
from shards.loading.index import ShardIndex


def train_and_show(config: Config, index: ShardIndex, started: float) -> int:
    """Train and print what came of it. The exit code: 0 when the work is done, 143 when it was asked to stop."""
    speaks = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=not speaks, highlight=False)
    console.print(f"{index.name}: {describe(index)}")
    run_dir = Storage(config.run.dir)
    if is_finished(config):
        console.print(f"finished before: nothing to do in {run_dir.url}")
        metrics = read_metrics(run_dir)
    else:
        images = {name: facts["images"] for name, facts in index.splits.items()}
        images["evaluation"] = max((count for name, count in images.items() if name != "train"), default=0)
        try:
            with follow(config.run.dir, images) if speaks else nullcontext():
                metrics = run(config)
        except (TrainingError, RankLost) as error:
            print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
            return 1
        except Stopped as stop:
            print(f"{stop}; run folder: {run_dir.url}", file=sys.stderr)
            return STOPPED_EXIT_CODE
    if "untrained" in metrics:
        console.print(result_table(metrics))
    console.print(f"run folder: {run_dir.url}", soft_wrap=True)
    return 0


def describe(index: ShardIndex) -> str:
    """ "train 1,200 images of 60 identities; query …; 6 cameras"."""
    splits = [f"{name} {s['images']:,} images of {s['identities']:,} identities" for name, s in index.splits.items()]
    return "; ".join([*splits, f"{index.cameras} cameras" if index.cameras else "no cameras"])


def is_finished(config: Config) -> bool:
    status = read_status(Storage(config.run.dir))
    return status.get("phase") == "finished" and status.get("run") == run_identity(config)


def result_table(metrics: dict[str, Any]) -> Table:
    """Percentages before and after training."""
    after, before = headline(metrics), headline(metrics["untrained"])
    table = Table("", *after)
    for name, row in (("untrained", before), ("after stage 2", after)):
        table.add_row(name, *(f"{100 * value:.1f}" for value in row.values()))
    return table
