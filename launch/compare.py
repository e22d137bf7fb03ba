"""Compare runs: settings that differ, figures, and how sure each difference is.

    python launch/compare.py runs/demo runs/other

All are evaluated anew, on the dataset and by the rule of the first run, and compared with it.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import (
    Parser,
    check_out,
    end,
    local_place,
    not_negative,
    owned_result,
    place,
    positive,
    progress_bar,
    run,
)

if TYPE_CHECKING:
    from cluster.comparison.compare_runs import Compared

EXAMPLE = """examples:
  python launch/compare.py runs/demo runs/other
  python launch/compare.py runs/seed0 runs/seed1 runs/seed2 --by query --html compared.html
  python launch/compare.py runs/demo runs/other --shards data/mine/shards --out compared.json

Intervals are of 95 %: the identities of the queries are drawn again and again, each with all of its queries, the same
ones for all runs. Beside a difference stands in how many resamples it has the sign that it has here. The draws say how
much the figures depend on the test's identities, and not how another run.seed would have come out: compare several."""
QUERIES, NEAREST = 10, 10


def main(arguments: list[str]) -> None:
    options = (parser := make_parser()).parse_args(arguments)
    if len(options.runs) < 2:
        parser.error("RUN: one run has nothing to be compared with; name two or more")
    for option in ("html", "out"):
        if getattr(options, option):
            check_out(parser, getattr(options, option), f"--{option}")
    if options.html and options.out and options.html.resolve() == options.out.resolve():
        parser.error(f"--out {options.out}: is the file of --html too; name another")

    from cluster.comparison.compare_runs import compare_runs

    nearest = NEAREST if options.html else 0
    compared = compare_runs(options.runs, options.shards, options.resamples, options.seed, nearest, progress_bar)
    if compared is not None:
        show(compared, by_query=options.by == "query")
        write(compared, options)


def make_parser() -> Parser:
    parser = Parser(prog="compare.py", description=__doc__.split("\n")[0], epilog=EXAMPLE)
    kinds = "run folders or model.safetensors files, paths or URLs; the others are compared with the first"
    parser.add_argument("runs", nargs="+", type=place, metavar="RUN", help=kinds)
    parser.add_argument("--shards", type=place, metavar="URL", help="packed dataset; default: that of the first run")
    parser.add_argument("--by", choices=("query",), help="also the queries that changed most")
    parser.add_argument("--html", type=local_place, metavar="FILE", help="a page, with pictures of these queries")
    parser.add_argument("--out", type=local_place, metavar="FILE", help="the tables as JSON")
    parser.add_argument("--resamples", type=positive, default=2000, metavar="N", help="default: 2000")
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="fixes the resamples; default: 0")
    return parser


def show(compared: "Compared", *, by_query: bool) -> None:
    from rich.console import Console

    from cluster.comparison.tables import changes_table, sentence, tables
    from shards.errors import masked

    console = Console(highlight=False, markup=False)
    for table in tables(compared.comparison):
        console.print(table)
    console.print(masked(sentence(compared.comparison)), soft_wrap=True)
    for name, results, changes in compared.changes(QUERIES) if by_query else ():
        console.print(changes_table(name, compared.comparison.names[0], results, changes))


def write(compared: "Compared", options: argparse.Namespace) -> None:
    import json

    from cluster.comparison.page import comparison_page
    from shards.storage import write_atomic

    if options.html:
        changes = compared.changes(QUERIES)
        page = comparison_page(compared.comparison, compared.results[0], changes, compared.image_size)
        with owned_result(options.html, "comparing"), write_atomic(str(options.html)) as file:
            file.write(page)
        print(options.html)
    if options.out:
        with owned_result(options.out, "comparing"), write_atomic(str(options.out)) as file:
            file.write(json.dumps(compared.comparison.to_json(), indent=1).encode() + b"\n")
        print(options.out)


if __name__ == "__main__":
    end(run(main))
