"""One part of `bench.py gpu` in a process of its own: stopped at its limit, and what it had by then is kept.

parts ──▶ [running] ──▶ outcome and result of each part ──▶ page
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from launch.gpu.parts import ROOT, Part

GRACE_S = 3.0
"""Between the request to end and the end."""
TAIL_LINES = 12


LOOKS_S = 0.1
"""Between two looks at a part."""


class Stop:
    """Whether SIGTERM or Ctrl-C asked for an end: what is known is written, and nothing more is begun."""

    asked = 0
    """The signal's number."""


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Within it these signals only leave word, so that no moment is a bad one for them."""
    stop = Stop()

    def ask(number: int, _: object) -> None:
        stop.asked = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Running:
    """A part on its way. `report` is what is known of it at any time."""

    def __init__(self, part: Part, out: Path, limit_s: float, log: IO[str]):
        """out: folder of results. log: takes what the part prints."""
        self.part, self.limit_s, self.log = part, limit_s, log
        self.result_file, self.printed_file = out / f"{part.name}.part.json", out / f"{part.name}.part.txt"
        self.command = [sys.executable, *part.words, *(["--out", str(self.result_file)] if part.writes else [])]
        self.outcome, self.seconds = "not begun", 0.0

    def run(self, stop: Stop) -> None:
        """Until the part's end, its limit, or a stop. Nothing of it lives on afterwards."""
        start = time.monotonic()
        with self.printed_file.open("w+") as printed:
            process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                stdout=printed,
                stderr=self.log,
                env=os.environ | {"PYTHONPATH": _with_root()} | self.part.environment,
                start_new_session=True,
            )
            try:
                while process.poll() is None and not stop.asked and time.monotonic() - start < self.limit_s:
                    time.sleep(LOOKS_S)
                if (code := process.poll()) is not None:
                    self.outcome = "done" if code == 0 else f"failed with exit code {code}"
                else:
                    limit = f"stopped at its limit of {self.limit_s:.0f} s"
                    self.outcome = "stopped from outside" if stop.asked else limit
            finally:
                self.seconds = time.monotonic() - start
                _end(process)

    def report(self) -> dict[str, Any]:
        known = {"name": self.part.name, "command": " ".join(["python", *self.part.words])}
        return known | {"outcome": self.outcome, "seconds": round(self.seconds, 1), "result": self._result()}

    def _result(self) -> dict[str, Any] | None:
        for file in (self.result_file, self.printed_file):
            with contextlib.suppress(OSError, ValueError):
                return json.loads(file.read_text())
        return None

    def clear(self) -> None:
        """What is reported lies in the whole result; what was printed and is no result goes to the log."""
        with contextlib.suppress(OSError):
            if self.result_file.exists() or self._result() is None:
                self.log.write(self.printed_file.read_text())
                self.log.flush()
        for file in (self.result_file, self.printed_file):
            file.unlink(missing_ok=True)


def read_checks(junit: Path) -> dict[str, Any] | None:
    """Counts and names from pytest's own report; None where it wrote none."""
    if not junit.exists():
        return None
    cases = list(ElementTree.parse(junit).iter("testcase"))
    failed, skipped = [], {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (why := case.find("skipped")) is not None:
            skipped[name] = why.get("message", "")
    passed = len(cases) - len(failed) - len(skipped)
    return {"passed": passed, "failed": failed, "skipped": skipped}


def _with_root() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def _end(process: subprocess.Popen) -> None:
    """The process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
