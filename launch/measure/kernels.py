"""Where the time of a step goes, kernel by kernel, as torch.profiler sees it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from launch.measure.timing import seconds

STEPS = 5


def top_kernels(step: Callable[[], object], device: torch.device, count: int) -> dict[str, Any]:
    """The kernels (on a CPU: operators) that take most time in a warm step, and how busy they keep the device."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    step_s = seconds(lambda: [step() for _ in range(STEPS)], device) / STEPS
    with profile(activities=activities) as seen:
        seconds(lambda: [step() for _ in range(STEPS)], device)
    kind = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = [event for event in seen.key_averages() if getattr(event, kind) > 0]
    if gpu:  # An operator of the host is charged with its kernels' time a second time.
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    total_us = sum(getattr(event, kind) for event in events) or 1.0
    rows = [
        {
            "name": event.key,
            "ms": round(getattr(event, kind) / STEPS / 1e3, 4),
            "share": round(getattr(event, kind) / total_us, 4),
            "calls": event.count / STEPS,
        }
        for event in sorted(events, key=lambda event: -getattr(event, kind))[:count]
    ]
    # The step is timed without the profiler, which slows the host down.
    return {"step_ms": round(step_s * 1e3, 3), "busy_ms": round(total_us / STEPS / 1e3, 3), "rows": rows}
