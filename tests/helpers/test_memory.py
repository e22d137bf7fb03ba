"""The memory of a test's process is that of the test, and too much of it fails."""

import mmap
import os
from types import SimpleNamespace

import pytest

from tests.helpers import memory


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system keeps the first peak")
def test_a_peak_is_forgotten_and_the_next_is_seen():
    held = hold(200)
    high = memory.peak_memory_mb()
    held.close()
    memory.forget_peak()
    low = memory.peak_memory_mb()
    assert low < high - 150
    held = hold(100)
    assert low + 80 < memory.peak_memory_mb() < high
    held.close()


def hold(megabytes):
    """Pages of the system's, written to: an allocator would keep those of before and give them out again."""
    pages = mmap.mmap(-1, megabytes << 20)
    for start in range(0, megabytes << 20, mmap.PAGESIZE):
        pages[start] = 1
    return pages


@pytest.mark.parametrize(("most_mb", "outcome"), [(0, "failed"), (1 << 20, "passed")])
def test_a_test_beyond_what_its_process_may_hold_fails_and_stands_first_in_the_table(monkeypatch, most_mb, outcome):
    monkeypatch.setattr(memory, "MOST_MB", most_mb)
    report = SimpleNamespace(nodeid="large", outcome="passed", passed=True, longrepr=None, user_properties=[])
    memory.note_peak(report)
    assert report.outcome == outcome and (report.longrepr is None) == (outcome == "passed")
    small = SimpleNamespace(nodeid="small", user_properties=[(memory.PROPERTY, 1)])
    assert [line.split()[2] for line in memory.table([small, report])] == ["large", "small"]
