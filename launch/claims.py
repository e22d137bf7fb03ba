"""The paper's claims measured in small: trains every row of its ablations on rendered vehicles, and compares them.

    python launch/claims.py

Repeating a command goes on: finished runs are kept, and a stopped one goes on from its checkpoint.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import Parser, end, local_place, not_negative, positive, run

EXAMPLE = """examples:
  python launch/claims.py
  python launch/claims.py --tables 4 --seeds 2 --jobs 1
  python launch/claims.py --tables 4 --seeds 1 --data data/tuning --data-seed 101 --out runs/tuning stage2.lr=3e-4
Tables 4 and 5 are one. The last example is how settings of stage 2 are chosen, on vehicles that the study does not
use. Overrides hold for all runs; give other ones an --out of their own."""


def main(arguments: list[str]) -> int:
    from launch.study.plan import TABLES

    numbers = [number for table in TABLES for number in table.number.split(", ")]
    parser = Parser(prog="claims.py", description=__doc__.split("\n")[0], epilog=EXAMPLE)
    parser.add_argument(
        "--tables", nargs="+", choices=numbers, default=numbers, metavar="N", help="of the paper: 4 to 11"
    )
    parser.add_argument("--seeds", type=positive, metavar="N", help="at most so many; default 5 for 4 and 5, else 3")
    parser.add_argument(
        "--jobs", type=positive, default=_cores(), metavar="N", help="runs at a time; default: the cores"
    )
    parser.add_argument("--data", type=local_place, default=Path("data/claims"), metavar="DIR", help="of the vehicles")
    parser.add_argument("--data-seed", type=not_negative, default=100, metavar="N", help="of the vehicles")
    parser.add_argument("--out", type=local_place, default=Path("runs/claims"), metavar="DIR", help="of the runs")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of all runs")
    return measure(parser.parse_intermixed_args(arguments))


def measure(options: argparse.Namespace) -> int:
    from launch.study.plan import TABLES, PlannedRun, planned_runs
    from launch.study.runner import Study, claim_folder, evaluate_raw, make_dataset, raw_weights, run_all

    study = Study(options.out.absolute(), options.data.absolute() / "shards", tuple(options.overrides))
    tables = [table for table in TABLES if set(table.number.split(", ")) & set(options.tables)]
    weights = raw_weights(study)  # A mistyped setting or a missing file shows before anything is rendered.
    claim_folder(study, options.data_seed)
    make_dataset(study, options.data_seed)
    raw = study.folder / "raw" / "queries.csv"
    evaluate_raw(study, weights, raw)

    def tell(done: int, total: int, run: PlannedRun) -> None:
        print(f"{done}/{total}: {run.variant}, seed {run.seed}", flush=True)

    run_all(study, planned_runs(tables, options.seeds), options.jobs, tell)

    from launch.study.comparison import identities
    from launch.study.report import measure as measured
    from launch.study.report import write

    place, text = write(measured(study, tables, options.seeds, raw, identities(str(study.shards))), study.folder)
    print(f"{text}table: {place}")
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    end(run(main))
