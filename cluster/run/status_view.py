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
WAITING = "waiting for workers"
"""Before there is a status."""


@contextmanager
def follow(run_dir: str) -> Iterator[None]:
    """Show a run's progress while the block runs."""
    done = threading.Event()
    viewer = threading.Thread(target=_watch, args=(Storage(run_dir), done), daemon=True)
    viewer.start()
    try:
        yield
    finally:
        done.set()
        viewer.join(timeout=5)


class MeanAP(NamedTuple):
    """How good a run is, in fractions; None where it is not known yet."""

    best: float | None
    best_epoch: int | None
    """Of the epochs that were evaluated; None for the last one's."""
    final: float | None

    @property
    def best_text(self) -> str:
        """ "66.0 (epoch 30)" in percent."""
        epoch = f" (epoch {self.best_epoch})" if self.best_epoch else ""
        return "-" if self.best is None else f"{100 * self.best:.1f}{epoch}"

    @property
    def final_text(self) -> str:
        return "-" if self.final is None else f"{100 * self.final:.1f}"


UNMEASURED = MeanAP(None, None, None)


class Activity(NamedTuple):
    """What a run is doing, for a progress bar."""

    text: str
    done: int
    """Steps or images."""
    total: int | None
    """None: not known."""
    speed: str


def activity_of(status: dict[str, Any]) -> Activity:
    """What is counted: the images of a sequential pass, else the steps of a stage."""
    speed = f"{status['images_per_s']:.0f} images/s" if status.get("images_per_s") else ""
    phase = status.get("phase", WAITING)
    if phase == "start" and status["restarts"]:
        place = status["resumed_from"] or "the beginning"
        return Activity(f"going on from {place}, restarts so far: {status['restarts']}", 0, None, "")
    if phase.startswith("stage "):
        text = f"{phase}, epoch {status['epoch']}/{status['epochs']}, loss {status['loss']:.3f}"
        return Activity(text, status["step"], status["step"] + status["steps_left"], speed)
    if status and has_ended(status):
        return Activity(phase, 0, None, "")
    return Activity(phase, status.get("images", 0), status.get("images_total"), speed)


def is_lifeless(status: dict[str, Any], now_s: float) -> bool:
    """Whether a run that has not ended is silent for longer than a living one is."""
    return now_s - status["updated"] > LIFELESS_S and not has_ended(status)


def summary(status: dict[str, Any], now_s: float, mAP: MeanAP = UNMEASURED) -> list[str]:
    """A status in lines, "name: value"."""
    age_s, lifeless = now_s - status["updated"], is_lifeless(status, now_s)
    lines = {"doing": status["phase"]}
    if lifeless:
        lines["doing"] = f"no sign of life for {clock(age_s)}; probably ended in {status['phase']}: repeat the command"
    if mAP != UNMEASURED:
        lines["mAP"] = f"{mAP.final_text}, best {mAP.best_text}"
    if "step" in status:
        lines["stage"] = f"{status['stage']}, epoch {status['epoch']} of {status['epochs']}"
        lines["step"] = f"{status['step']} of about {status['step'] + status['steps_left']}"
        lines["loss"] = f"{status['loss']:.4f}"
    if status["phase"].startswith("stage ") and not lifeless:
        lines["time left"] = f"{clock(status['seconds_left'])} in this stage"
    if status.get("images_per_s") and not lifeless:
        lines["speed"] = f"{status['images_per_s']:.0f} images/s"
    saved_at = status.get("checkpoint_at")
    ago = f", {clock(now_s - saved_at)} ago" if saved_at else ""
    lines["last checkpoint"] = f"{status['checkpoint']}{ago}" if status.get("checkpoint") else "none"
    if "log_gap" in status:
        lines["log lacks"] = status["log_gap"]
    lines["restarts"] = str(status["restarts"])
    nodes = ", ".join(f"{host}: {count}" for host, count in sorted(status["nodes"].items()))
    lines["workers"] = f"{status['workers']} ({nodes})"
    lines["updated"] = f"{clock(max(age_s, 0))} ago"
    return [f"{name + ':':<17}{text}" for name, text in lines.items()]


def clock(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"


def _watch(run: Storage, done: threading.Event) -> None:
    started = time.time()
    if sys.stderr.isatty():
        _draw_bar(run, done, started)
    else:
        _print_lines(run, done, started)


def _fresh(run: Storage, started: float) -> dict[str, Any]:
    """The status, unless it is one that an earlier start left."""
    status = read_status(run)
    return status if status.get("updated", 0) >= started else {}


class _Bars:
    """A bar for each phase of a run, one below the other. What counts nothing has one only while it lasts."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.phase: str | None = WAITING
        self.task = progress.add_task(WAITING, total=None, speed="")

    def show(self, status: dict[str, Any]) -> None:
        text, count, total, speed = activity_of(status)
        phase = status.get("phase", WAITING)
        if status and phase != self.phase and has_ended(status):
            self._end(all_done=phase == "finished")
            self.phase = phase
            return
        if phase != self.phase:
            self._end(all_done=True)
            self.phase, self.task = phase, self.progress.add_task(text, total=total, completed=count, speed=speed)
        elif not (status and has_ended(status)):
            self.progress.update(self.task, description=text, completed=count, total=total, speed=speed)

    def close(self) -> None:
        """Nothing goes on: a bar that only waits is gone."""
        self._end(all_done=False)

    def _end(self, *, all_done: bool) -> None:
        """all_done: what was counted last may be from before the end."""
        total = self.progress.tasks[-1].total
        if total is None:
            self.progress.update(self.task, visible=False)
        elif all_done:
            self.progress.update(self.task, completed=total)
        self.progress.stop_task(self.task)


def _draw_bar(run: Storage, done: threading.Event, started: float) -> None:
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
        bars, table, ended = _Bars(progress), None, False
        while not ended:
            ended = done.wait(0.3)  # Once more after the end: the last bar has to get there.
            status = _fresh(run, started)
            if status.get("workers_table") != table:
                table = status.get("workers_table")
                progress.console.print(table or "", highlight=False)
            bars.show(status)
        bars.close()


def _print_lines(run: Storage, done: threading.Event, started: float) -> None:
    phase, printed_at, first, table, ended = None, 0.0, (0, 0.0), None, False
    while not ended:
        ended = done.wait(0.5)  # Once more after the end: a short run may have said nothing yet.
        status = _fresh(run, started)
        if status.get("workers_table") != table:
            table = status.get("workers_table")
            print(table or "", file=sys.stderr)
        text, count, total, speed = activity_of(status)
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
