"""Where a run's news go: rank 0's run folder, Ray's report, and the requests to stop that come back."""

import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from cluster.ranks.team import Team
from cluster.run.manifest import Position
from cluster.run.ray_metrics import Gauges
from cluster.run.run_folder import RunFolder
from cluster.run.storage import Storage
from cluster.settings.config import Config, results_settings, settings_hash

STOP = "stop-request"
POLL_S = {True: 1.0, False: 5.0}
"""On a local disk; elsewhere, where a look takes as long as a training step."""
DRAIN_POLL_S = 5.0


class RunReporter:
    """The loop's reporter on every rank. Only rank 0 writes."""

    def __init__(
        self, config: Config, team: Team, position: Position | None, report: Callable | None,
        evaluate: Callable[[str], dict[str, Any]],
    ):  # fmt: skip
        self.config = config
        self.team = team
        self.report = report
        self.evaluate = evaluate
        self.folder = None
        self._stop = StopRequest(config, team)
        self._next_drain_poll_s = 0.0
        self._times_s: deque[float] = deque(maxlen=50)
        nodes = Counter(team.all_gather_objects(socket.gethostname(), "host names"))
        team.on_first(lambda: self._open_folder(position, nodes), "open the run folder")

    def _open_folder(self, position: Position | None, nodes: dict[str, int]) -> None:
        self.folder = RunFolder(self.config, *([Gauges(self.config.run.dir).set] if self.report else []))
        self.folder.go_on_from(position)
        place = position and position.words
        self.folder.status(
            now=True, workers=self.team.world_size, nodes=nodes, phase="start", resumed_from=place, checkpoint=place
        )

    def known_metrics(self) -> dict[str, Any]:
        return self.folder.read_metrics() if self.folder else {}

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Called by every rank. Raises TrainingError on all of them where the metrics cannot be written."""
        self.team.on_first(lambda: self.folder.write_metrics(metrics), "write the metrics")

    def show_workers(self, table: str) -> None:
        if self.folder:
            self.folder.status(now=True, workers_table=table)

    def phase(self, name: str) -> None:
        self._phase_from_s = time.monotonic()
        if self.folder:
            self.folder.status(now=True, phase=name, images=0, images_per_s=None)

    def images(self, count: int) -> None:
        """Progress of a sequential pass, images of this rank."""
        if self.folder:
            elapsed = time.monotonic() - self._phase_from_s
            workers = self.team.world_size
            self.folder.status(images=count * workers, images_per_s=round(count * workers / max(elapsed, 1e-3), 1))

    def step(self, entry: dict[str, Any], *, steps_left: int, epochs: int) -> None:
        """One step's log entry; `steps_left` of the stage are estimated (PK epochs differ by a few steps)."""
        if self.folder:
            self.folder.log(entry)
            facts = {key: entry[key] for key in ("stage", "epoch", "step", "loss", "images_per_s")}
            self._times_s.append(time.monotonic())
            step_s = (self._times_s[-1] - self._times_s[0]) / max(len(self._times_s) - 1, 1)
            facts["seconds_left"] = round(steps_left * step_s)
            self.folder.status(phase=f"stage {entry['stage']}", epochs=epochs, steps_left=steps_left, **facts)

    def flush(self) -> None:
        if self.folder:
            self.folder.flush()

    def saved(self, name: str) -> None:
        if self.folder:
            self.folder.status(now=True, checkpoint=name, checkpoint_at=time.time())

    def epoch(self, stage: int, epoch: int) -> float | None:
        """Evaluate where it is due, tell Ray. The last epoch is evaluated when the run finishes."""
        every = self.config.eval.every_epochs
        mAP, metrics = None, {}
        if stage == 2 and every and epoch % every == 0 and epoch < self.config.stage2.epochs:
            metrics = self.evaluate(f"evaluate epoch {epoch}")
            mAP = headline(metrics)["mAP"]
            if self.folder:
                for name, value in headline(metrics).items():
                    self.folder.event(f"eval/{name}", value, epoch)
        if self.report:
            self.report({"stage": stage, "epoch": epoch} | ({"mAP": mAP} if mAP is not None else {}))
        return mAP

    def should_stop(self) -> bool:
        return self._stop.asked()

    def wants_drain_notice(self) -> bool:
        """Rank 0 under Ray asks for one now and then: every answer is a broadcast through Ray."""
        return bool(self.report and self.folder) and time.monotonic() > self._next_drain_poll_s

    def drain_notice(self) -> bool:
        from ray.train import get_preemption_info

        self._next_drain_poll_s = time.monotonic() + DRAIN_POLL_S
        return get_preemption_info() is not None

    def finished(self) -> None:
        self.team.on_first(lambda: self.folder.flush(), "write the log")
        if self.folder:
            self.folder.status(now=True, phase="finished", run=run_identity(self.config))

    def ended(self, how: str) -> None:
        """Before its time."""
        if self.folder:
            self.folder.status(now=True, phase=how)

    def close(self) -> None:
        if self.folder:
            self.folder.close()


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


class StopRequest:
    """SIGTERM to this process, or a file that the driver put into the run folder when it was told to stop."""

    def __init__(self, config: Config, team: Team):
        self.storage = Storage(config.run.dir)
        self.polls = team.is_first
        self.seen = False
        self._next_poll_s = 0.0
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Ray runs workers in another; its driver asks by file.
            signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        self.seen = True

    def asked(self) -> bool:
        if self.polls and not self.seen and time.monotonic() > self._next_poll_s:
            self._next_poll_s = time.monotonic() + POLL_S[self.storage.local_root is not None]
            self.seen = self.storage.exists(STOP)
        return self.seen


def request_stop(run_dir: str) -> None:
    """Ask a run's workers, wherever they are, to save a checkpoint at the next step and stop."""
    Storage(run_dir).write(STOP, str(os.getpid()).encode())


def withdraw_stop(run_dir: str) -> None:
    Storage(run_dir).remove(STOP)
