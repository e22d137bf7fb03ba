"""How much memory a piece of work takes: of this process or of another one, each with its children."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch

from launch.measure.timing import peak_memory_bytes, seconds

SAMPLE_S = 0.05
"""Seconds between two looks at the memory."""


class PeakMemory:
    """Looks at the resident memory of a process and its children while the block runs.

        with PeakMemory() as memory:
            work()
        memory.above_bytes

    Shared pages count in each process.
    """

    def __init__(self, pid: int | None = None):
        """pid: by default this process."""
        self.pid = pid or os.getpid()
        self.start_bytes = self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def above_bytes(self) -> int:
        """The peak above what was held when the block began."""
        return self.peak_bytes - self.start_bytes

    def __enter__(self) -> Self:
        self.start_bytes = self.peak_bytes = _family_bytes(self.pid)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, _family_bytes(self.pid))


def seconds_and_memory(work: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Seconds and metrics of `work`, and the most memory it held above what was held before."""
    metrics: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    with PeakMemory() as memory:
        duration = seconds(lambda: metrics.update(work()), device)
    result = {"seconds": round(duration, 4), "memory_above_features_mb": round(memory.above_bytes / 1e6)}
    if device.type == "cuda":
        result["gpu_memory_above_features_mb"] = round((peak_memory_bytes(device) - held) / 1e6)
    return result | {"metrics": metrics}


def _family_bytes(pid: int) -> int:
    return sum(_resident_bytes(member) for member in _family(pid))


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from _family(int(child))
    except OSError:  # it has ended
        return


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it has ended
        return 0
