"""What a run is doing: stage, epoch, step, loss, speed, time left, last checkpoint, restarts, workers per node.

    python launch/status.py runs/demo

Reads the run folder's status.json, which rank 0 writes.
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
  python launch/status.py runs/demo --json"""


def main(arguments: list[str]) -> None:
    parser = Parser(prog="status.py", description=__doc__.split("\n")[0], epilog=EXAMPLE)
    parser.add_argument("run", type=place, metavar="RUN", help="run folder: a path or URL, the run.dir of the settings")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="print again until the run has finished")
    parser.add_argument("--json", action="store_true", help="the status as rank 0 wrote it")
    options = parser.parse_args(arguments)
    while show(options):
        time.sleep(options.every)


def show(options: argparse.Namespace) -> bool:
    """Print the status once. Whether to print it again."""
    import json

    from cluster.errors import ConfigError
    from cluster.run.run_folder import read_status
    from cluster.run.status_view import summary
    from cluster.run.storage import Storage

    status = read_status(Storage(options.run))
    if not status:
        raise ConfigError(
            f"{options.run}: no status.json that can be read; a run writes it into its run.dir once its workers have "
            "started"
        )
    print(json.dumps(status) if options.json else "\n".join(summary(status, time.time())), flush=True)
    return bool(options.every) and status["phase"] != "finished"


if __name__ == "__main__":
    end(run(main))
