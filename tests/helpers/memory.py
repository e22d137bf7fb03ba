"""How much memory a process has used at the most, and which tests used most of it."""

import contextlib
from pathlib import Path

MOST_MB = 3000
"""That a test's process may hold at any time."""
PROPERTY = "peak_memory_mb"
SHOWN = 20


def peak_memory_mb():
    """Of this process since its program began, or since `forget_peak`. (The figure of getrusage begins with the
    parent's.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024


def forget_peak():
    """From here on the peak is that of what is held now and comes. Without effect where the system forbids it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def note_peak(report):
    """In the report of a test's end, which fails where the peak is too high."""
    peak_mb = peak_memory_mb()
    report.user_properties.append((PROPERTY, peak_mb))
    if peak_mb > MOST_MB and report.passed:
        report.outcome = "failed"
        report.longrepr = f"its process held {peak_mb} MB, more than the {MOST_MB} that a test may"


def table(reports):
    """Lines of the tests with the highest peaks, from the reports of their ends."""
    peaks = {report.nodeid: dict(report.user_properties)[PROPERTY] for report in reports}
    largest = sorted(peaks, key=peaks.get, reverse=True)[:SHOWN]
    return [f"{peaks[name]:6} MB  {name}" for name in largest]
