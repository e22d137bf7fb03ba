"""The run folder as rank 0 writes it: a log without gap or repetition, a status that does not hold up training; and
what the live view makes of it."""

import json

import fsspec
import pytest

from cluster.config import parse_config
from cluster.live import describe
from cluster.manifest import Position
from cluster.run_folder import RunFolder
from cluster.storage import Storage


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path):
    """URL of a run folder on a disk, or in a store that shows a file only when it is closed."""
    yield str(tmp_path / "run") if request.param == "local" else "memory://bucket/run"
    fsspec.filesystem("memory").store.clear()


def folder_at(place):
    return RunFolder(parse_config({"data": {"shards": "x"}, "run": {"dir": place}}))


def log_of(place):
    return [(e["stage"], e["step"]) for e in map(json.loads, Storage(place).read("log.jsonl").decode().splitlines())]


def log_steps(folder, stage, steps):
    for step in steps:
        folder.log({"stage": stage, "epoch": 1, "step": step})


def test_after_a_kill_the_log_goes_on_from_the_checkpoint(place):
    killed = folder_at(place)
    killed.go_on_from(None)
    log_steps(killed, 1, [1, 2])
    log_steps(killed, 2, [1, 2, 3])
    killed.flush()
    text = Storage(place).read("log.jsonl")
    Storage(place).write("log.jsonl", text + b'{"stage": 2, "epo')  # Cut short by the kill.
    again = folder_at(place)
    again.go_on_from(Position(2, 1, 2, 2, False))
    log_steps(again, 2, [3, 4])
    again.close()
    assert log_of(place) == [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (2, 4)]


def test_starts_are_counted_until_the_run_has_finished(place):
    restarts = []
    for phase in ("stage 1", "stage 2", "finished", "stage 1"):
        folder = folder_at(place)
        folder.status(now=True, phase=phase)
        restarts.append(Storage(place).read_json("status.json")["restarts"])
    assert restarts == [0, 1, 2, 2]


def test_the_status_is_written_seldom_where_a_write_takes_long(place, monkeypatch):
    folder, now, written = folder_at(place), [0.0], []
    monkeypatch.setattr("cluster.run_folder.time.monotonic", lambda: now[0])
    monkeypatch.setattr(folder.storage, "write_json", lambda name, facts: written.append(facts["step"]))
    for step in range(1, 101):  # Ten steps a second.
        now[0] += 0.1
        folder.status(step=step)
    assert len(written) <= (2 if place.startswith("memory") else 20)


@pytest.mark.parametrize("place", ["stage 2, epoch 3, step 12", None])
def test_the_live_view_says_from_where_a_run_goes_on(place):
    status = {"phase": "start", "restarts": 2, "resumed_from": place}
    assert describe(status, {})[0] == f"going on from {place or 'the beginning'}, restarts so far: 2"
    assert describe(status | {"restarts": 0}, {})[0] == "start"
