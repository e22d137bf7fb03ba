"""What a run leaves behind, written by rank 0: settings, log, metrics, live status and TensorBoard events.

    reporter ──▶ [run folder] ──▶ config.yaml  log.jsonl  metrics.json  status.json  tensorboard/

Beside them lie checkpoints/, stage1.safetensors and model.safetensors, which the worker writes.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from typing import IO, Any

from cluster.errors import TrainingError
from cluster.run.manifest import Position
from cluster.run.storage import Storage
from cluster.run.tensorboard import Events
from cluster.settings.config import Config
from cluster.settings.yaml_file import dump_config
from shards.errors import masked
from shards.leftovers import remove_leftovers
from shards.sealed import SealError, digest, unseal
from shards.storage import sync

log = logging.getLogger(__name__)
CONFIG = "config.yaml"
STAGE1_RESULT = "stage1.safetensors"
LOG = "log.jsonl"
METRICS = "metrics.json"
STATUS = "status.json"
METRICS_SUM = "metrics_sha256"
"""What the status says of metrics.json."""
BEST = "best"
"""What it says of the epoch with the highest mAP so far, of those that were evaluated: {"mAP": …, "epoch": …}."""
STATUS_EVERY_S = {True: 0.5, False: 5.0}
"""On a local disk; elsewhere, where a write takes as long as a training step."""
BEAT_S = 10.0
"""The longest that a status stays as it is while its run lives, whatever the run is doing."""
ENDED = ("finished", "stopped", "failed")
"""How the phase of a run begins that is over."""


def has_ended(status: dict[str, Any]) -> bool:
    return status["phase"].startswith(ENDED)


def read_status(run: Storage) -> dict[str, Any]:
    """The newest status of a run, or nothing where there is none yet, or none that can be read."""
    try:
        return run.read_sealed(STATUS)
    except (OSError, SealError):
        return {}


def read_metrics(run: Storage) -> dict[str, Any]:
    """What a run has measured so far; nothing where that is not there, or not what was written. Its checksum is in the
    status: the file itself holds metrics only."""
    try:
        metrics = unseal(run.read(METRICS))
        if read_status(run).get(METRICS_SUM, digest(metrics)) != digest(metrics):
            raise SealError("it is not what the run wrote last")
    except FileNotFoundError:
        return {}
    except SealError as error:
        log.warning("%s cannot be used (%s): it is measured again", run.place(METRICS), error)
        return {}
    return metrics


def read_log(content: bytes) -> dict[tuple[int, int], str]:
    """The whole lines of a log by (stage, step), in their order; what a kill or a power loss tore is left out."""
    lines: dict[tuple[int, int], str] = {}
    last = (0, 0)
    for line in content.decode(errors="replace").splitlines():
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            entry = json.loads(line)
            stage, step = entry["stage"], entry["step"]
            if type(stage) is type(step) is int and (stage, step) > last:
                last = (stage, step)
                lines[last] = line
    return lines


def find_gap(lines: Iterable[tuple[int, int]], position: Position) -> str:
    """The steps between the log's first line and the position that it lacks, in words; empty where it lacks none. A
    run that began from another's checkpoint has no lines of what that run did."""
    done = (position.stage, position.step)
    places = [place for place in lines if place <= done]
    gaps = [] if places or done[1] == 0 else [(done[0], 1, done[1])]
    for (stage, step), (next_stage, next_step) in pairwise([*places, (done[0], done[1] + 1)] if places else []):
        first = step + 1 if stage == next_stage else 1
        if first < next_step:
            gaps.append((next_stage, first, next_step - 1))
    return ", ".join(f"stage {stage}, steps {first} to {last}" for stage, first, last in gaps)


def _restarts(before: dict[str, Any]) -> int:
    """How often a run was started before its end: the status of the start before knows."""
    return before.get("restarts", 0) + (before.get("phase") != "finished") if before else 0


class RunFolder:
    """The folder as rank 0 writes it. On a local disk a log line is on disk when its step ends; elsewhere the log
    is written whole with every checkpoint."""

    def __init__(self, config: Config, on_status: Callable[[dict[str, Any]], None] | None = None):
        """on_status: is told every status that is written."""
        self.on_status = on_status
        self.storage = Storage(config.run.dir)
        if self.storage.local_root is not None:
            remove_leftovers(self.storage.local_root)
        with self.storage.writing(CONFIG):
            self.storage.write(CONFIG, masked(dump_config(config)).encode())
        self._lines: list[str] = []
        self._file: IO[str] | None = None
        self._events = Events(f"{self.storage.url}/tensorboard", None)
        before = read_status(self.storage)
        self._status: dict[str, Any] = {"restarts": _restarts(before)}
        self._status |= {name: before[name] for name in (METRICS_SUM, BEST) if name in before}
        self._status_at_s = 0.0
        self._one_at_a_time = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def go_on_from(self, position: Position | None) -> None:
        """Drop what was logged after the position, so that the log has neither gap nor repetition."""
        self._events.position = position
        if position is None:
            self._status.pop(BEST, None)
        self._lines = []
        if position is not None and self.storage.exists(LOG):
            lines = read_log(self.storage.read(LOG))
            self._lines = [line for place, line in lines.items() if place <= (position.stage, position.step)]
            if gap := find_gap(lines, position):
                self._status["log_gap"] = gap
                log.warning("%s lacks %s: they were lost; the run goes on", self.storage.place(LOG), gap)
        with self.storage.writing(LOG):
            self.storage.write(LOG, "".join(line + "\n" for line in self._lines).encode())
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
        """What was logged is on the storage when this returns. Raises TrainingError where it cannot be written."""
        with self.storage.writing(LOG):
            if self._file is not None:
                self._file.flush()
                sync(self._file.fileno())
            elif self._lines:
                self.storage.write(LOG, "".join(line + "\n" for line in self._lines).encode())

    def evaluated(self, mAP: float, epoch: int) -> None:
        """Keep the best in the status. What a restart measures again comes out the same."""
        if mAP > self._status.get(BEST, {"mAP": -1.0})["mAP"]:
            self.status(now=True, **{BEST: {"mAP": mAP, "epoch": epoch}})

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Raises TrainingError where they cannot be written."""
        with self.storage.writing(METRICS):
            self.storage.write_json(METRICS, metrics)
        self.status(now=True, **{METRICS_SUM: digest(metrics)})

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
            self.storage.write_sealed(STATUS, self._status | {"updated": time.time()}, durable=False)
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
