"""What dead processes left is removed by the next start, and nothing else is touched."""

import os
import subprocess
import sys
import time

import pytest

from cluster.run.run_folder import RunFolder
from shards.leftovers import ABANDONED_S, remove_leftovers, working_name
from shards.storage import write_atomic
from tests.helpers.checkpoints import settings_of


def killed_while_writing(path):
    """A process that is killed while it writes there."""
    script = f"""
import os, signal
from shards.storage import write_atomic
with write_atomic({str(path)!r}) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)


@pytest.fixture
def left(tmp_path):
    killed_while_writing(tmp_path / "model.safetensors")
    (found,) = tmp_path.iterdir()
    assert found.name.startswith(".model.safetensors.")
    return found


def test_the_next_write_of_the_same_file_removes_what_a_kill_left(left, tmp_path):
    with write_atomic(str(tmp_path / "other")) as file:
        file.write(b"x")
    assert left.exists()
    with write_atomic(str(tmp_path / "model.safetensors")) as file:
        file.write(b"x")
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "other"}


def test_the_next_start_of_a_run_removes_what_a_kill_left(left, tmp_path):
    RunFolder(settings_of(tmp_path)).close()
    assert not left.exists()


def test_of_living_processes_other_places_and_other_names_nothing_is_touched(tmp_path):
    own = working_name("model")
    _, _, place, pid, random = own.split(".")
    kept = [
        own,
        f".model.{'0' * 12}.{pid}.{random}",  # of another host or container, where the number says nothing here
        f".model.{'0' * 12}.999999999.{random}",
        ".model.txt",
        f".model.{place}.999999999",
        f"model.{place}.999999999.{random}",
        f".model.{place}.999999999.{random}.bak",
        f".model.{place}.1.{random}",  # another user's, or ours: it lives
        ".owner",
    ]
    for name in [*kept, f".model.{place}.999999999.{random}"]:
        (tmp_path / name).write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_what_came_from_elsewhere_goes_when_nobody_wrote_to_it_for_a_day(tmp_path):
    names = [f".model.{'0' * 12}.77.deadbeef", ".model.77.deadbeef"]
    for age_s in (ABANDONED_S - 60, ABANDONED_S + 60):
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
            os.utime(tmp_path / name, (time.time() - age_s,) * 2)
        before = len(list(tmp_path.iterdir()))
        remove_leftovers(tmp_path)
        assert (before, len(list(tmp_path.iterdir()))) == (2, 2 if age_s < ABANDONED_S else 0)


def test_a_folder_that_is_not_there_is_no_fault(tmp_path):
    remove_leftovers(tmp_path / "none")
