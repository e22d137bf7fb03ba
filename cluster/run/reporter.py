"""Where a run's news go: rank 0's run folder, and Ray's report of all ranks.

    worker, loop ── phase, step, saved, … ──▶ [reporter] ──▶ log.jsonl, status.json, metrics.json, TensorBoard, Ray

A reporter is told; it neither measures nor decides.
"""

import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Protocol

from cluster.ranks.team import Team
from cluster.run.manifest import Position
from cluster.run.ray_metrics import Gauges
from cluster.run.run_folder import RunFolder
from cluster.settings.config import Config, results_settings, settings_hash

Report = Callable[[dict[str, Any]], None]
"""Takes the figures of an epoch; called by all ranks together (under Ray Train: `ray.train.report`)."""
RECENT_STEPS = 50
"""Steps whose mean duration gives the time left."""


class Reporter(Protocol):
    """What the worker and the loop tell, on every rank."""

    def workers(self, table: str) -> None:
        """The table of pre-flight."""

    def phase(self, name: str) -> None:
        """What is being done from now on."""

    def images(self, done: int, total: int) -> None:
        """Progress of a sequential pass, over all ranks."""

    def step(self, entry: dict[str, Any], *, steps_left: int, epochs: int) -> None:
        """A step's log entry; `steps_left` of the stage are estimated (PK epochs differ by a few steps)."""

    def flush(self) -> None:
        """What was told of steps is on the storage when this returns."""

    def saved(self, name: str) -> None:
        """A checkpoint is being written; `name` says of which step."""

    def epoch(self, stage: int, epoch: int, metrics: dict[str, Any] | None) -> None:
        """An epoch is done. All ranks call this together; metrics: where it was evaluated."""

    def metrics(self, metrics: dict[str, Any]) -> None:
        """What metrics.json is to hold."""

    def finished(self) -> None:
        """All is done."""

    def ended(self, how: str) -> None:
        """The run ends before its time."""

    def close(self) -> None: ...


class SilentReporter:
    """The reporter of every rank but the first: Ray is told of epochs, which all ranks have to do together."""

    def __init__(self, report: Report | None = None):
        self.report = report

    def epoch(self, stage: int, epoch: int, metrics: dict[str, Any] | None) -> None:
        if self.report:
            self.report({"stage": stage, "epoch": epoch} | ({"mAP": headline(metrics)["mAP"]} if metrics else {}))

    def step(self, entry: dict[str, Any], *, steps_left: int, epochs: int) -> None: ...
    def images(self, done: int, total: int) -> None: ...
    def workers(self, table: str) -> None: ...
    def phase(self, name: str) -> None: ...
    def saved(self, name: str) -> None: ...
    def ended(self, how: str) -> None: ...
    def metrics(self, metrics: dict[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def finished(self) -> None: ...
    def close(self) -> None: ...


class RunReporter(SilentReporter):
    """The first rank's reporter: it keeps the run folder.

    Raises TrainingError where the log or the metrics cannot be written; a status that cannot be written is passed over.
    """

    def __init__(self, config: Config, position: Position | None, nodes: dict[str, int], report: Report | None = None):
        """position: from where the run goes on. nodes: workers on each host."""
        super().__init__(report)
        self.config = config
        self.folder = RunFolder(config, on_status=Gauges(config.run.dir).set if report else None)
        self.folder.go_on_from(position)
        self._phase_from_s = time.monotonic()
        self._step_ends_s: deque[float] = deque(maxlen=RECENT_STEPS)
        resumed_from = position and position.words
        self._show(
            workers=sum(nodes.values()), nodes=nodes, phase="start", resumed_from=resumed_from, checkpoint=resumed_from
        )

    def _show(self, **facts: Any) -> None:
        self.folder.status(now=True, **facts)

    def workers(self, table: str) -> None:
        self._show(workers_table=table)

    def phase(self, name: str) -> None:
        self._phase_from_s = time.monotonic()
        self._show(phase=name, images=0, images_total=None, images_per_s=None)

    def images(self, done: int, total: int) -> None:
        elapsed_s = max(time.monotonic() - self._phase_from_s, 1e-3)
        self.folder.status(images=done, images_total=total, images_per_s=round(done / elapsed_s, 1))

    def step(self, entry: dict[str, Any], *, steps_left: int, epochs: int) -> None:
        self.folder.log(entry)
        facts = {key: entry[key] for key in ("stage", "epoch", "step", "loss", "images_per_s")}
        self._step_ends_s.append(time.monotonic())
        step_s = (self._step_ends_s[-1] - self._step_ends_s[0]) / max(len(self._step_ends_s) - 1, 1)
        facts["seconds_left"] = round(steps_left * step_s)
        self.folder.status(phase=f"stage {entry['stage']}", epochs=epochs, steps_left=steps_left, **facts)

    def flush(self) -> None:
        self.folder.flush()

    def saved(self, name: str) -> None:
        self._show(checkpoint=name, checkpoint_at=time.time())

    def epoch(self, stage: int, epoch: int, metrics: dict[str, Any] | None) -> None:
        if metrics:
            figures = headline(metrics)
            for name, value in figures.items():
                self.folder.event(f"eval/{name}", value, epoch)
            self.folder.evaluated(figures["mAP"], epoch)
        super().epoch(stage, epoch, metrics)

    def metrics(self, metrics: dict[str, Any]) -> None:
        self.folder.write_metrics(metrics)

    def finished(self) -> None:
        self.folder.flush()
        self._show(phase="finished", run=run_identity(self.config))

    def ended(self, how: str) -> None:
        self._show(phase=how)

    def close(self) -> None:
        self.folder.close()


def open_reporter(config: Config, team: Team, position: Position | None, report: Report | None) -> Reporter:
    """This rank's reporter. Raises TrainingError, on every rank, where the run folder cannot be written."""
    nodes = Counter(team.all_gather_objects(socket.gethostname(), "host names"))
    reporters: list[Reporter] = [SilentReporter(report)]
    team.on_first(lambda: reporters.append(RunReporter(config, position, nodes, report)), "open the run folder")
    return reporters[-1]


def run_identity(config: Config) -> dict[str, Any]:
    """What has to be the same for a finished run to count as this run."""
    return {
        "settings": settings_hash(results_settings(config)),
        "stages": list(config.stages),
        "epochs": [config.stage1.epochs, config.stage2.epochs],
    }


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """mAP and CMC of a person-style evaluation, or of VehicleID's largest gallery."""
    if "mAP" in metrics:
        return {name: metrics[name] for name in ("mAP", "R1", "R5", "R10")}
    largest = next(metrics[size] for size in ("large", "medium", "small") if size in metrics)
    return {name: largest[name]["mean"] for name in ("mAP", "R1", "R5")}
