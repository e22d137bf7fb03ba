"""All that one GPU can tell within eight minutes: checks, then the speed of every part, written as it comes.

Parts run one after the other, in processes of their own, each under its own limit (`launch/gpu/parts.py`). The folder
gets gpu.json, gpu.md (tables for the README, and the top kernels) and gpu.log (what the parts print). A run that is
stopped keeps what it has. It needs torch and the packages of `launch/gpu/packages.txt`, no network, and neither Ray
nor DeepSpeed. Without a GPU it is a rehearsal: every part, in small sizes, on the CPU.
"""

import argparse
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from launch.cli import Parser, local_place, positive

if TYPE_CHECKING:
    from launch.gpu.parts import Part
    from launch.gpu.running import Stop

EXAMPLE = """examples:
  python launch/bench.py gpu --out gpu
  python launch/bench.py gpu --out gpu --only checks stage2

The exit code is 0 where every part was done and no check failed."""
PACKAGES = "launch/gpu/packages.txt"
NO_DEEPSPEED = "left out: no DeepSpeed here"
LEAST_S = 5
"""With less time left nothing is begun."""


def run(arguments: list[str]) -> dict[str, Any]:
    options = _options(arguments)
    from launch.gpu.running import stoppable
    from shards.storage import write_json

    whole = Whole(options)
    options.out.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        from launch.gpu.page import page

        write_json(str(options.out / "gpu.json"), result := whole.result())
        (options.out / "gpu.md").write_text(page(result))

    with (options.out / "gpu.log").open("w") as log, stoppable() as stop:
        keep()
        for part in whole.parts:
            if not stop.asked:
                whole.take(part, log, stop)
                keep()
    print((options.out / "gpu.md").read_text(), file=sys.stderr)
    if stop.asked:
        raise SystemExit(128 + stop.asked)
    if whole.faults():
        raise SystemExit(1)
    return whole.result()


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py gpu", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--out", type=local_place, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--minutes", type=positive, default=8, help="for all of it (default 8)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some of its parts")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    options = parser.parse_args(arguments)
    if lacking := missing_packages():
        parser.error(f"this Python lacks {', '.join(lacking)}: {PACKAGES} says how to bring them without a network")
    from launch.gpu.parts import parts

    known = [part.name for part in parts(False, Path())]
    if unknown := [name for name in options.only or () if name not in known]:
        parser.error(f"--only {' '.join(unknown)}: no such part; known: {', '.join(known)}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out}: is no folder")
    return options


def missing_packages() -> list[str]:
    """Those of the list that are not installed here, in any version, and torch where it is not."""
    from launch.gpu.parts import ROOT

    names = re.findall(r"^([\w-]+)==", (ROOT / PACKAGES).read_text(), re.MULTILINE)
    return [name for name in ("torch", "torchvision", *names) if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


class Whole:
    """All parts, and what is known of them so far."""

    def __init__(self, options: argparse.Namespace):
        import torch

        from launch.gpu.parts import parts
        from launch.measure.timing import choose_device, machine_facts

        self.device = choose_device(options.device)
        self.facts = machine_facts(self.device)
        self.torch = torch.__version__
        self.rehearsal = self.device.type != "cuda"
        self.out = options.out
        self.junit = self.out / "checks.part.xml"
        chosen = parts(self.rehearsal, self.junit.absolute())
        self.parts = [part for part in chosen if not options.only or part.name in options.only]
        self.start, self.limit_s = time.monotonic(), 60.0 * options.minutes
        self.date = time.strftime("%Y-%m-%d")
        self.reports: list[dict[str, Any]] = []

    def take(self, part: "Part", log: IO[str], stop: "Stop") -> None:
        """Run one part, as far as there is time."""
        from launch.gpu.running import Running, read_checks

        left_s = self.limit_s - (time.monotonic() - self.start)
        running = Running(part, self.out.absolute(), min(part.limit_s, left_s), log)
        if part.name == "engine" and not _installed("deepspeed"):
            running.outcome = NO_DEEPSPEED
        elif left_s < LEAST_S:
            running.outcome = "left out: no time left"
        else:
            print(f"{part.name} …", end=" ", flush=True, file=sys.stderr)
            running.run(stop)
            print(f"{running.outcome}, {running.seconds:.0f} s", file=sys.stderr)
        report = running.report()
        if part.name == "checks":
            report["result"] = read_checks(self.junit)
            self.junit.unlink(missing_ok=True)
        self.reports.append(report)
        running.clear()

    def faults(self) -> list[str]:
        """Parts that should have been done and were not."""
        return [report["name"] for report in self.reports if report["outcome"] not in ("done", NO_DEEPSPEED)]

    def result(self) -> dict[str, Any]:
        return {
            "bench": "gpu",
            "date": self.date,
            "commit": _commit(),
            **self.facts,
            "python": platform.python_version(),
            "rehearsal": self.rehearsal,
            "seconds": round(time.monotonic() - self.start),
            "parts": self.reports,
        }


def _commit() -> str:
    from launch.gpu.parts import ROOT

    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
