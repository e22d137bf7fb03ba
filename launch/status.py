"""What a run is doing: stage, epoch, step, loss, speed, time left, last checkpoint, restarts, mAP; or a table of runs.

    python launch/status.py runs/demo
    python launch/status.py runs

Reads the run folder's status.json, which rank 0 writes, and its metrics.json.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import Parser, end, place, run

EXAMPLE = """examples:
  python launch/status.py runs/demo
  python launch/status.py s3://bucket/runs/veri776 --every 10
  python launch/status.py runs/demo --json
  python launch/status.py runs

Of a folder that holds runs: a line for each, with its state, its last sign of life, and its best and final mAP."""


def main(arguments: list[str]) -> None:
    parser = Parser(prog="status.py", description=__doc__.split("\n")[0], epilog=EXAMPLE)
    kinds = "run folder, the run.dir of the settings, or a folder of such: a path or URL"
    parser.add_argument("run", type=place, metavar="RUN|RUNS_FOLDER", help=kinds)
    parser.add_argument("--every", type=float, metavar="SECONDS", help="print again until the runs have ended")
    parser.add_argument("--json", action="store_true", help="the status as rank 0 wrote it, or the table's values")
    options = parser.parse_args(arguments)
    while show(options):
        time.sleep(options.every)


def show(options: argparse.Namespace) -> bool:
    """Print once what there is. Whether to print it again."""
    import json

    from rich.console import Console

    from cluster.errors import ConfigError
    from cluster.run.run_folder import read_status
    from cluster.run.run_list import list_runs, mean_ap, runs_table
    from cluster.run.status_view import summary
    from cluster.run.storage import Storage

    folder, now_s = Storage(options.run), time.time()
    if status := read_status(folder):
        lines = summary(status, now_s, mean_ap(folder, status))
        print(json.dumps(status) if options.json else "\n".join(lines), flush=True)
        return bool(options.every) and status["phase"] != "finished"
    if runs := list_runs(folder, now_s):
        if options.json:
            print(json.dumps([each.to_json() for each in runs]), flush=True)
        else:
            Console(highlight=False, markup=False).print(runs_table(runs))
        return bool(options.every) and not all(each.is_over for each in runs)
    raise ConfigError(
        f"{options.run}: no status.json that can be read, and no runs below it; a run writes it into its run.dir once "
        "its workers have started"
    )


if __name__ == "__main__":
    end(run(main))
