"""The device, whole-device timing, and medians of things that are measured in turn."""

import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cluster.errors import ConfigError
from cluster.ranks.arithmetic import full_float32


def choose_device(name: str | None) -> torch.device:
    """The device called `name`, by default a GPU where there is one. Raises ConfigError where there is none such."""
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"--device {device}: there is no such device here; use cpu or leave it out") from None
    full_float32()
    return torch.device(device)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What has to be known of a machine to read a figure from it."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    return {"device": _processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def settle(device: torch.device) -> None:
    """Wait until the device has done all work that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Duration of `work`, until the device is through with it."""
    settle(device)
    start = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - start


def median_seconds_in_turn(
    works: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Each work's median duration over `rounds` rounds of all of them, so that a slow minute hits them all alike.

    A round before these warms up and is not counted.
    """
    durations: dict[str, list[float]] = {name: [] for name in works}
    for counted in [False] + [True] * rounds:
        for name, work in works.items():
            duration = seconds(work, device)
            if counted:
                durations[name].append(duration)
    return {name: statistics.median(values) for name, values in durations.items()}


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on a GPU since `torch.cuda.reset_peak_memory_stats`, on a CPU by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
