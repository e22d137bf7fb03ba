"""What a run leaves behind, written by rank 0: settings, log, metrics, live status and TensorBoard events.

    reporter ──▶ [run folder] ──▶ config.yaml  log.jsonl  metrics.json  status.json  tensorboard/

Beside them lie checkpoints/, stage1.safetensors and model.safetensors, which the worker writes.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from cluster.errors import TrainingError
from cluster.run.manifest import Position
from cluster.run.storage import Storage
from cluster.run.tensorboard import Events
from cluster.settings.config import Config
from cluster.settings.yaml_file import dump_config

log = logging.getLogger(__name__)
CONFIG = "config.yaml"
STAGE1_RESULT = "stage1.safetensors"
LOG = "log.jsonl"
METRICS = "metrics.json"
STATUS = "status.json"
STATUS_EVERY_S = {True: 0.5, False: 5.0}
"""On a local disk; elsewhere, where a write takes as long as a training step."""
BEAT_S = 10.0
"""The longest that a status stays as it is while its run lives, whatever the run is doing."""
ENDED = ("finished", "stopped", "failed")
"""How the phase of a run begins that is over."""


def has_ended(status: dict[str, Any]) -> bool:
    return status["phase"].startswith(ENDED)


def read_status(run: Storage) -> dict[str, Any]:
    """The newest status of a run, or nothing where there is none yet."""
    try:
        return run.read_json(STATUS)
    except (OSError, ValueError):
        return {}


def read_metrics(run: Storage) -> dict[str, Any]:
    """What a run has measured so far, or nothing."""
    return run.read_json(METRICS) if run.exists(METRICS) else {}


class RunFolder:
    """The folder as rank 0 writes it. On a local disk a log line is on disk when its step ends; elsewhere the log
    is written whole with every checkpoint."""

    def __init__(self, config: Config, on_status: Callable[[dict[str, Any]], None] | None = None):
        """on_status: is told every status that is written."""
        self.on_status = on_status
        self.storage = Storage(config.run.dir)
        with self.storage.writing(CONFIG):
            self.storage.write(CONFIG, dump_config(config).encode())
        self._lines: list[str] = []
        self._file: IO[str] | None = None
        self._events = Events(f"{self.storage.url}/tensorboard", None)
        self._status: dict[str, Any] = {"restarts": self._restarts()}
        self._status_at_s = 0.0
        self._one_at_a_time = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _restarts(self) -> int:
        """How often this run was started before its end: the status of the start before knows."""
        before = read_status(self.storage)
        return before.get("restarts", 0) + (before["phase"] != "finished") if before else 0

    def go_on_from(self, position: Position | None) -> None:
        """Drop what was logged after the position, so that the log has neither gap nor repetition."""
        self._events.position = position
        kept = []
        if position is not None and self.storage.exists(LOG):
            for line in self.storage.read(LOG).decode().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # A last line that the kill cut short.
                    continue
                if (entry["stage"], entry["step"]) <= (position.stage, position.step):
                    kept.append(line)
        self._lines = kept
        with self.storage.writing(LOG):
            self.storage.write(LOG, "".join(line + "\n" for line in kept).encode())
        if self.storage.local_root is not None:
            self._file = (self.storage.local_root / LOG).open("a", buffering=1)

    def log(self, entry: dict[str, Any]) -> None:
        """One step. The numbers also go to TensorBoard, under `stage1/…` and `stage2/…`.

        Raises TrainingError where the line cannot be written.
        """
        line = json.dumps(entry)
        if self._file is not None:
            with self.storage.writing(LOG):
                self._file.write(line + "\n")
        else:
            self._lines.append(line)
        for name, value in entry.items():
            if name not in ("stage", "epoch", "step"):
                self.event(f"stage{entry['stage']}/{name}", value, entry["step"])

    def event(self, name: str, value: float, step: int) -> None:
        self._events.add(name, value, step)

    def flush(self) -> None:
        """Raises TrainingError where the log cannot be written."""
        if self._file is None and self._lines:
            with self.storage.writing(LOG):
                self.storage.write(LOG, "".join(line + "\n" for line in self._lines).encode())

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Raises TrainingError where they cannot be written."""
        with self.storage.writing(METRICS):
            self.storage.write_json(METRICS, metrics)

    def status(self, *, now: bool = False, **facts: Any) -> None:
        """What the status view shows. Written every STATUS_EVERY_S, unless `now`."""
        with self._one_at_a_time:
            self._status |= facts
            if now or time.monotonic() - self._status_at_s > STATUS_EVERY_S[self.storage.local_root is not None]:
                self._write_status()

    def _write_status(self) -> None:
        self._status_at_s = time.monotonic()
        if self.on_status:
            self.on_status(self._status)
        try:
            self.storage.write_json(STATUS, self._status | {"updated": time.time()})
        except Exception as error:  # Who looks on misses something; the run does not.
            log.warning("%s/%s cannot be written (%s)", self.storage.url, STATUS, error)

    def _beat(self) -> None:
        """Say that the run lives also while it has no news: who looks on cannot tell a long phase from a dead run."""
        while not self._closed.wait(BEAT_S / 4):
            with self._one_at_a_time:
                silent_s = time.monotonic() - self._status_at_s
                if silent_s > BEAT_S and "phase" in self._status and not has_ended(self._status):
                    self._write_status()

    def close(self) -> None:
        """Let go of the files. What cannot be written any more is a warning and does not hide why the run ends."""
        self._closed.set()
        try:
            self.flush()
            if self._file is not None:
                self._file.close()
        except (OSError, TrainingError) as error:
            log.warning("%s", error)
        self._events.close()
