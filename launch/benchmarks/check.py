"""The quick benchmarks of this checkout in turn with those of an earlier commit: what got faster or slower.

The commit is checked out beside this one (`git worktree`), and both run with this Python, round by round, so that a
slow minute of the machine hits them alike. A figure's ratio is the median over the rounds, "times as fast" as before:
above 1 is faster. The plain versions that the benchmarks compare with are in the table too: nobody changed them, so
what their ratios differ from 1 is the machine's noise.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from cluster.errors import ConfigError
from launch.cli import Parser, positive

EXAMPLE = """examples:
  python launch/bench.py check --against HEAD~1
  python launch/bench.py check --against main --only stage1 loader --rounds 5"""
ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = {
    "stage1": "--arch configs/models/small_vit.json --rounds 10 --device cpu",
    "stage2": "--cases tiny:64x64 --batch 16 --steps 5 --modes eager --device cpu",
    "loader": "--cases 120x300:128x256 --identities 16 --rounds 3",
    "evaluate": "--queries 1000 --gallery 10000 --identities 500 --sample 5 --device cpu",
    "rerank": "--queries 500 --gallery 3000 --identities 200 --device cpu",
    "checkpoint": "--arch configs/models/small_vit.json --image-size 64x64 --batch 16",
}
"""Options that the earlier commit has to know as well; a benchmark that does not run there is named as absent."""
FASTER_IS_MORE = re.compile(r"per_s$")
FASTER_IS_LESS = re.compile(r"(^|\.)seconds$|_ms$|_s$")
NOISE = 0.1
"""Ratios this near to 1 are not called slower."""


def run(arguments: list[str]) -> dict[str, Any]:
    options = _options(arguments)
    figures: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    with checked_out(options.against) as before:
        for name in options.only or QUICK:
            try:
                figures += compare(name, before, options.rounds)
            except subprocess.CalledProcessError as error:
                absent[name] = (error.stderr or "").strip().splitlines()[-1:][0] if error.stderr else str(error)
        commit = _git(before, "rev-parse", "--short", "HEAD")
    slower = [f"{f['benchmark']} {f['figure']}" for f in figures if f["times_as_fast"] < 1 - NOISE]
    print(table(figures, commit), file=sys.stderr)
    return {"bench": "check", "against": commit, "figures": figures, "slower": slower, "absent": absent}


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py check", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--against", required=True, metavar="COMMIT", help="the earlier one, as git knows it")
    parser.add_argument("--only", nargs="+", choices=list(QUICK), help="some of the benchmarks")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="times that each runs (default 3)")
    return parser.parse_args(arguments)


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the project as it was, gone when the block ends. Raises ConfigError where git has none such."""
    with tempfile.TemporaryDirectory(prefix="bench-check-") as folder:
        place = Path(folder) / "before"
        try:
            _git(ROOT, "worktree", "add", "--detach", str(place), commit)
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip().splitlines()[-1:]
            raise ConfigError(f"--against {commit}: git cannot check it out ({' '.join(reason)})") from None
        try:
            yield place
        finally:
            _git(ROOT, "worktree", "remove", "--force", str(place))


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def compare(name: str, before: Path, rounds: int) -> list[dict[str, Any]]:
    """Rows of one benchmark. Raises CalledProcessError where it fails on either side."""
    results: dict[Path, list[dict[str, float]]] = {before: [], ROOT: []}
    for number in range(rounds):
        for side in (before, ROOT) if number % 2 == 0 else (ROOT, before):
            results[side].append(dict(figures_of(measure(name, side))))
    rows = []
    for figure in results[ROOT][0]:
        pairs = [(old[figure], new[figure]) for old, new in zip(*results.values(), strict=True) if figure in old]
        if pairs and min(min(pair) for pair in pairs) > 0:
            ratios = [new / old if FASTER_IS_MORE.search(figure) else old / new for old, new in pairs]
            old, new = (median(values) for values in zip(*pairs, strict=True))
            row = {"benchmark": name, "figure": figure, "before": old, "now": new}
            rows.append(row | {"times_as_fast": round(median(ratios), 3)})
    return rows


def measure(name: str, side: Path) -> dict[str, Any]:
    command = [sys.executable, "launch/bench.py", name, *QUICK[name].split()]
    environment = os.environ | {"PYTHONPATH": str(side)}
    done = subprocess.run(command, cwd=side, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout[done.stdout.index("{") :])


def figures_of(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Speeds and durations of a result, by their place in it."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from figures_of(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, int | float) and (FASTER_IS_MORE.search(path) or FASTER_IS_LESS.search(path)):
        yield path, tree


def table(figures: list[dict[str, Any]], commit: str) -> str:
    lines = [f"{'benchmark':<11} {'figure':<42} {commit:>10} {'now':>10} {'times as fast':>14}"]
    for f in figures:
        numbers = f"{f['before']:>10.4g} {f['now']:>10.4g} {f['times_as_fast']:>14.2f}"
        lines.append(f"{f['benchmark']:<11} {f['figure']:<42} {numbers}")
    return "\n".join(lines)
