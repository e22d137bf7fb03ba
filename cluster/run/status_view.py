"""A run seen from outside: a progress bar, or a line now and then.

    run.dir/status.json ──▶ [status view] ──▶ the terminal of whoever started the run; `launch/status.py`

Rank 0 keeps the status, wherever it runs; whoever looks on needs only the run folder.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cluster.run.run_folder import BEAT_S, has_ended, read_status
from cluster.run.storage import Storage

LINE_EVERY_S = 10.0
LIFELESS_S = 6 * BEAT_S
"""A status older than this is that of a dead run, or of one whose workers are being started again."""


@contextmanager
def follow(run_dir: str, images: dict[str, int]) -> Iterator[None]:
    """Show a run's progress while the block runs. `images`: number of images per split, for sequential passes."""
    done = threading.Event()
    viewer = threading.Thread(target=_watch, args=(Storage(run_dir), images, done), daemon=True)
    viewer.start()
    try:
        yield
    finally:
        done.set()
        viewer.join(timeout=5)


class Activity(NamedTuple):
    """What a run is doing, for a progress bar."""

    text: str
    done: int
    """Steps or images."""
    total: int | None
    """None: not known."""
    speed: str


def activity_of(status: dict[str, Any], images: dict[str, int]) -> Activity:
    """images: number of images per split."""
    speed = f"{status['images_per_s']:.0f} images/s" if status.get("images_per_s") else ""
    phase = status.get("phase", "waiting for workers")
    if phase == "start" and status["restarts"]:
        place = status["resumed_from"] or "the beginning"
        return Activity(f"going on from {place}, restarts so far: {status['restarts']}", 0, None, "")
    if phase.startswith("stage "):
        text = f"{phase}, epoch {status['epoch']}/{status['epochs']}, loss {status['loss']:.3f}"
        return Activity(text, status["step"], status["step"] + status["steps_left"], speed)
    if phase == "stopped" or phase.startswith("failed: "):
        return Activity(phase, 0, None, "")
    total = images.get("train", 0) if "training images" in phase else images.get("evaluation", 0)
    return Activity(phase, min(status.get("images", 0), total), total or None, speed)


def summary(status: dict[str, Any], now_s: float) -> list[str]:
    """A status in lines, "name: value"."""
    age_s = now_s - status["updated"]
    lifeless = age_s > LIFELESS_S and not has_ended(status)
    lines = {"doing": status["phase"]}
    if lifeless:
        lines["doing"] = f"no sign of life for {_clock(age_s)}; probably ended in {status['phase']}: repeat the command"
    if "step" in status:
        lines["stage"] = f"{status['stage']}, epoch {status['epoch']} of {status['epochs']}"
        lines["step"] = f"{status['step']} of about {status['step'] + status['steps_left']}"
        lines["loss"] = f"{status['loss']:.4f}"
    if status["phase"].startswith("stage ") and not lifeless:
        lines["time left"] = f"{_clock(status['seconds_left'])} in this stage"
    if status.get("images_per_s") and not lifeless:
        lines["speed"] = f"{status['images_per_s']:.0f} images/s"
    saved_at = status.get("checkpoint_at")
    ago = f", {_clock(now_s - saved_at)} ago" if saved_at else ""
    lines["last checkpoint"] = f"{status['checkpoint']}{ago}" if status.get("checkpoint") else "none"
    if "log_gap" in status:
        lines["log lacks"] = status["log_gap"]
    lines["restarts"] = str(status["restarts"])
    nodes = ", ".join(f"{host}: {count}" for host, count in sorted(status["nodes"].items()))
    lines["workers"] = f"{status['workers']} ({nodes})"
    lines["updated"] = f"{_clock(max(age_s, 0))} ago"
    return [f"{name + ':':<17}{text}" for name, text in lines.items()]


def _clock(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"


def _watch(run: Storage, images: dict[str, int], done: threading.Event) -> None:
    started = time.time()
    if sys.stderr.isatty():
        _draw_bar(run, images, done, started)
    else:
        _print_lines(run, images, done, started)


def _fresh(run: Storage, started: float) -> dict[str, Any]:
    """The status, unless it is one that an earlier start left."""
    status = read_status(run)
    return status if status.get("updated", 0) >= started else {}


def _draw_bar(run: Storage, images: dict[str, int], done: threading.Event, started: float) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task, phase, table = progress.add_task("waiting for workers", total=None, speed=""), None, None
        while not done.wait(0.3):
            status = _fresh(run, started)
            if status.get("workers_table") != table:
                table = status.get("workers_table")
                progress.console.print(table or "", highlight=False)
            text, count, total, speed = activity_of(status, images)
            if status.get("phase") != phase:
                phase = status.get("phase")
                progress.stop_task(task)
                task = progress.add_task(text, total=total, completed=count, speed=speed)
            progress.update(task, description=text, completed=count, total=total, speed=speed)


def _print_lines(run: Storage, images: dict[str, int], done: threading.Event, started: float) -> None:
    phase, printed_at, first, table, ended = None, 0.0, (0, 0.0), None, False
    while not ended:
        ended = done.wait(0.5)  # Once more after the end: a short run may have said nothing yet.
        status = _fresh(run, started)
        if status.get("workers_table") != table:
            table = status.get("workers_table")
            print(table or "", file=sys.stderr)
        text, count, total, speed = activity_of(status, images)
        if status.get("phase") != phase:
            phase, first = status.get("phase"), (count, time.monotonic())
        elif time.monotonic() - printed_at < LINE_EVERY_S:
            continue
        printed_at = time.monotonic()
        line = [text, f"{count}/{total}" if total else "", speed, _time_left(count, total, first)]
        print(" | ".join(column for column in line if column), file=sys.stderr, flush=True)


def _time_left(count: int, total: int | None, first: tuple[int, float]) -> str:
    if not total or count <= first[0]:
        return ""
    seconds = (time.monotonic() - first[1]) / (count - first[0]) * (total - count)
    return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"
