"""Measure one part of the system; prints one JSON object.

    python launch/bench.py stage1

Each benchmark is a file of `launch/benchmarks`.
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import Parser, end, run

EXAMPLE = """examples:
  python launch/bench.py stage1
  python launch/bench.py stage2 --cases vit:256x128 --batch 64 > stage2.json
  python launch/bench.py NAME --help"""


def names() -> list[str]:
    """Each benchmark is a file of `launch/benchmarks`."""
    folder = Path(__file__).resolve().parent / "benchmarks"
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def main(arguments: list[str]) -> None:
    parser = Parser(prog="bench.py", description=__doc__.split("\n")[0], epilog=EXAMPLE)
    parser.add_argument("name", metavar="NAME", choices=names(), help=f"one of: {', '.join(names())}")
    options = parser.parse_args(arguments[:1])
    benchmark = importlib.import_module(f"launch.benchmarks.{options.name}")
    print(json.dumps(benchmark.run(arguments[1:]), indent=1))


if __name__ == "__main__":
    end(run(main))
