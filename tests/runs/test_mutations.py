"""Two thousand mutated files of every kind: each is read right or refused in one line, in time and in memory."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.mutations import CLASSES, LIMIT_MB
from tests.helpers.runs import ROOT, environment

SEED = int(os.environ.get("FAULT_SEED", 13))


def assert_withstood(count, timeout_s):
    """Each class with so many files, in a process of its own."""
    command = [sys.executable, "-m", "tests.helpers.mutations", str(count), str(SEED)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"exit code {done.returncode} in {done.stderr[-2000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    for name, counts in found["counts"].items():
        print(f"{name}: {counts} (FAULT_SEED={SEED})")
    assert not found["failures"], "\n\n".join(found["failures"][:10])
    assert found["counts"].keys() == CLASSES.keys()
    assert all(sum(counts.values()) == count for counts in found["counts"].values())
    assert found["peak_mb"] < LIMIT_MB


def test_200_mutated_files_are_read_right_or_refused_in_one_line():
    assert_withstood(25, 600)


@pytest.mark.faults
def test_2000_mutated_files_are_read_right_or_refused_in_one_line():
    assert_withstood(250, 3600)
