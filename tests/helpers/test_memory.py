"""The memory of a test's process is that of the test, and too much of it fails."""

import os
from types import SimpleNamespace

import pytest

from tests.helpers import memory


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system keeps the first peak")
def test_a_peak_is_forgotten_and_the_next_is_seen():
    held = b"x" * (200 << 20)
    high = memory.peak_memory_mb()
    del held
    memory.forget_peak()
    low = memory.peak_memory_mb()
    assert low < high - 150
    held = b"x" * (100 << 20)
    assert low + 80 < memory.peak_memory_mb() < high
    del held


@pytest.mark.parametrize(("most_mb", "outcome"), [(0, "failed"), (1 << 20, "passed")])
def test_a_test_beyond_what_its_process_may_hold_fails_and_stands_first_in_the_table(monkeypatch, most_mb, outcome):
    monkeypatch.setattr(memory, "MOST_MB", most_mb)
    report = SimpleNamespace(nodeid="large", outcome="passed", passed=True, longrepr=None, user_properties=[])
    memory.note_peak(report)
    assert report.outcome == outcome and (report.longrepr is None) == (outcome == "passed")
    small = SimpleNamespace(nodeid="small", user_properties=[(memory.PROPERTY, 1)])
    assert [line.split()[2] for line in memory.table([small, report])] == ["large", "small"]
