"""One living writer: whoever comes second is refused, and a dead one's mark is no obstacle."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from shards import owner, storage
from shards.leftovers import number_space
from shards.owner import OwnedError, owned_file, owned_folder
from tests.helpers.runs import ROOT

HOLD = """
import sys, time
from shards.owner import owned_folder
time.sleep(float(sys.argv[2]))
try:
    with owned_folder(sys.argv[1], "training"):
        print("owned", flush=True)
        sys.stdin.read()
except ValueError as error:
    print(f"refused: {error}", flush=True)
"""


def start(folder, delay_s=0.0):
    """A process that owns the folder until its input is closed, if it may."""
    command = [sys.executable, "-c", HOLD, str(folder), str(delay_s)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def fast(monkeypatch):
    """Heartbeats of an object store without their waiting times."""
    for name, seconds in (("BEAT_S", 0.2), ("STALE_S", 0.8), ("SETTLE_S", 0.3)):
        monkeypatch.setattr(owner, name, seconds)


def test_of_processes_that_start_at_random_distances_one_owns_the_folder(tmp_path):
    chance = random.Random(0)
    for turn in range(5):
        folder = tmp_path / str(turn)
        writers = [start(folder, chance.uniform(0, 0.3)) for _ in range(4)]
        lines = [writer.stdout.readline() for writer in writers]
        for writer in writers:
            writer.communicate(timeout=30)
        assert sorted(line[:5] for line in lines) == ["owned", "refus", "refus", "refus"]
        assert not list(folder.iterdir())


def test_the_refusal_names_process_host_and_work_and_a_killed_owner_is_no_obstacle(tmp_path):
    other = start(tmp_path)
    assert other.stdout.readline() == "owned\n"
    refusal = rf"process {other.pid} on \S+ is training there, since \d+ s"
    with pytest.raises(OwnedError, match=refusal), owned_folder(str(tmp_path), "training"):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with owned_folder(str(tmp_path), "training"):
        assert json.loads((tmp_path / ".owner").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_child_that_outlives_the_owner_does_not_keep_its_place(tmp_path):
    code = (
        "import os, sys, time\nfrom shards.owner import owned_folder\n"
        "with owned_folder(sys.argv[1], 'training'):\n"
        "    child = os.fork()\n"
        "    if not child: time.sleep(30); os._exit(0)\n"
        "    print(child, flush=True); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(done.stdout.readline())
    done.wait()
    try:
        with owned_folder(str(tmp_path), "training"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_one_process_does_not_own_a_place_twice_but_files_beside_each_other(tmp_path):
    first, second = (owned_file(str(tmp_path / name), "evaluating") for name in ("a.json", "b.json"))
    again = owned_file(str(tmp_path / "a.json"), "evaluating")
    with first, second, pytest.raises(OwnedError, match="this process"), again:
        pass
    assert not list(tmp_path.iterdir())


def test_without_locks_a_mark_that_beats_refuses_and_one_that_stands_still_is_taken_over(fast):
    url = "memory://owner-test"
    with owned_folder(url, "training"):
        owner._held.clear()  # as another process would see it
        with pytest.raises(OwnedError, match="is training there"), owned_folder(url, "training"):
            pass
    assert storage.list_folder(url) == []
    dead = {"doing": "training", "host": "elsewhere", "pid": 1, "since": time.time(), "token": "x", "beat": 7}
    storage.write_json(f"{url}/.owner", dead)
    with owned_folder(url, "training"):
        assert json.loads(storage.read_bytes(f"{url}/.owner"))["token"] != "x"


def test_of_two_marks_written_at_once_the_one_that_stays_wins(fast, monkeypatch):
    url, write = "memory://owner-race", owner._write

    def overtaken(mark, facts):
        write(mark, facts)
        write(mark, facts | {"token": "other", "host": "elsewhere"})

    monkeypatch.setattr(owner, "_write", overtaken)
    with pytest.raises(OwnedError, match="on elsewhere"), owned_folder(url, "training"):
        pass


def test_the_mark_of_a_process_that_ended_here_is_no_obstacle_and_one_of_elsewhere_is_waited_for(fast, caplog):
    """A container may have our host's name and other processes under the same numbers."""
    url = "memory://owner-ended"
    for place, waited in ((number_space(), False), ("of a container", True)):
        caplog.clear()
        ended = {"doing": "training", "host": socket.gethostname(), "place": place, "pid": 999_999_999, "token": "x"}
        storage.write_json(f"{url}/.owner", ended)
        with owned_folder(url, "training"):
            assert ("looking for" in caplog.text) is waited


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"[]", b"7", b"{"])
def test_a_damaged_mark_is_no_more_than_a_mark(fast, content):
    url = "memory://owner-damaged"
    with storage.write_atomic(f"{url}/.owner") as file:
        file.write(content)
    with owned_folder(url, "training"):
        pass


def test_a_second_build_and_a_second_evaluation_are_refused_and_leave_the_first_alone(tmp_path):
    """While somebody else owns the place, the commands end with 2 and one line, and write nothing."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "table.csv").write_text("path,identity,split\nimages/a.png,1,train\n")
    rng = np.random.default_rng(0)
    sides = {f"{side}_features": rng.normal(size=(4, 8)).astype(np.float32) for side in ("query", "gallery")}
    np.savez(tmp_path / "features.npz", **sides, query_identities=np.arange(4), gallery_identities=np.arange(4))
    out, metrics = tmp_path / "shards", tmp_path / "metrics.json"
    build = ["pack.py", "build", "--dataset", "manifest", "--root", tmp_path / "table.csv", "--out", out]
    evaluate = ["evaluate.py", "--features", tmp_path / "features.npz", "--rule", "none", "--out", metrics]
    with owned_folder(str(out), "packing"), owned_file(str(metrics), "evaluating"):
        before = sorted(path.name for path in [*tmp_path.iterdir(), *out.iterdir()])
        for command, doing in ((build, "packing"), (evaluate, "evaluating")):
            program, *arguments = map(str, command)
            done = subprocess.run(
                [sys.executable, str(ROOT / "launch" / program), *arguments], capture_output=True, text=True
            )
            assert done.returncode == 2 and f"is {doing} there" in done.stderr
            assert done.stderr.count("\n") == 1, done.stderr
        assert sorted(path.name for path in [*tmp_path.iterdir(), *out.iterdir()]) == before
