"""The run folder as rank 0 writes it: a log without gap or repetition, a status that does not hold up training; and
what the live view makes of it."""

import json
import signal
import time
from pathlib import Path

import fsspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.errors import TrainingError
from cluster.launchers.run import run
from cluster.run.interrupts import Interrupts, request_stop
from cluster.run.manifest import Position
from cluster.run.reporter import RunReporter
from cluster.run.run_folder import RunFolder
from cluster.run.status_view import LIFELESS_S, activity_of, summary
from cluster.run.storage import Storage
from cluster.run.tensorboard import Events, first_new_step
from cluster.settings.yaml_file import parse_config


@pytest.fixture(autouse=True)
def own_signals():
    """A worker takes SIGTERM and Ctrl-C as requests to stop; this process goes on as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path):
    """URL of a run folder on a disk, or in a store that shows a file only when it is closed."""
    yield str(tmp_path / "run") if request.param == "local" else "memory://bucket/run"
    fsspec.filesystem("memory").store.clear()


def config_at(place):
    return parse_config({"data": {"shards": "x"}, "run": {"dir": place}})


def folder_at(place):
    return RunFolder(config_at(place))


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
    monkeypatch.setattr("cluster.run.run_folder.time.monotonic", lambda: now[0])
    monkeypatch.setattr(folder.storage, "write_json", lambda name, facts: written.append(facts["step"]))
    for step in range(1, 101):  # Ten steps a second.
        now[0] += 0.1
        folder.status(step=step)
    assert len(written) <= (2 if place.startswith("memory") else 20)


def test_a_request_to_stop_that_an_earlier_start_left_does_not_stop_the_next(tmp_path, monkeypatch):
    cluster = {"launcher": "local", "cpus_per_worker": 1}
    config = parse_config({"data": {"shards": "x"}, "run": {"dir": str(tmp_path)}, "cluster": cluster})
    request_stop(config.run.dir)
    monkeypatch.setattr(
        "cluster.training.worker.train", lambda config, team: Interrupts(Storage(config.run.dir)).pending()
    )
    assert run(config).stop is False


@pytest.mark.parametrize("place", ["stage 2, epoch 3, step 12", None])
def test_the_live_view_says_from_where_a_run_goes_on(place):
    status = {"phase": "start", "restarts": 2, "resumed_from": place}
    assert activity_of(status)[0] == f"going on from {place or 'the beginning'}, restarts so far: 2"
    assert activity_of(status | {"restarts": 0})[0] == "start"


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_an_error_that_names_the_file_and_closing_does_not_hide_it(tmp_path, caplog):
    folder = folder_at(str(tmp_path))
    folder._file = Path("/dev/full").open("a", buffering=1)  # noqa: SIM115
    with pytest.raises(
        TrainingError, match=r"log.jsonl cannot be written .*No space left.*make room.*repeat the command"
    ):
        log_steps(folder, 1, [1])
    folder.close()
    assert "No space left" in caplog.text


def test_metrics_that_cannot_be_written_are_an_error_that_names_the_file(place, monkeypatch):
    folder = folder_at(place)
    monkeypatch.setattr(folder.storage, "write", full_disk)
    with pytest.raises(TrainingError, match=r"run/metrics.json cannot be written .*No space left"):
        folder.write_metrics({"mAP": 0.5})


def test_events_that_cannot_be_written_are_told_once_and_dropped(tmp_path, monkeypatch, caplog):
    folder = folder_at(str(tmp_path))
    folder.go_on_from(None)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full_disk)
    for step in (1, 2):
        folder.log({"stage": 1, "epoch": 1, "step": step, "loss": 0.5})
    folder.close()
    assert caplog.text.count("No space left") == 1 and log_of(str(tmp_path)) == [(1, 1), (1, 2)]


def test_curves_show_each_step_once_after_a_run_went_on_from_a_checkpoint(tmp_path):
    for position, steps, loss in ((None, range(1, 6), 0.1), (Position(2, 1, 3, 3, False), range(4, 7), 0.2)):
        events = Events(str(tmp_path), position)
        for step in steps:
            events.add("stage2/loss", loss, step)
            if position is None:
                events.add("stage1/loss", loss, step)
        events.close()
    curves = {}
    for group in ("stage1", "stage2"):
        seen = EventAccumulator(str(tmp_path / group)).Reload()
        curves[group] = [(event.step, round(event.value, 1)) for event in seen.Scalars(f"{group}/loss")]
    assert curves["stage1"] == [(step, 0.1) for step in range(1, 6)]
    assert curves["stage2"] == [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.2), (5, 0.2), (6, 0.2)]


@pytest.mark.parametrize(
    ("position", "first"),
    [
        (None, {"stage1": 1, "stage2": 1, "eval": 1}),
        (Position(1, 2, 3, 9, False), {"stage1": 10, "stage2": 1, "eval": 1}),
        (Position(2, 3, 4, 20, True), {"stage2": 21, "eval": 4}),
        (Position(2, 3, 2, 18, False), {"stage2": 19, "eval": 3}),
    ],
)
def test_what_a_run_does_again_is_taken_off_its_curves(position, first):
    assert {group: first_new_step(group, position) for group in first} == first


def test_the_status_says_how_a_run_ended_and_its_last_checkpoint(place):
    reporter = RunReporter(config_at(place), None, {"host": 1})
    reporter.phase("stage 2")
    reporter.saved("stage 2, epoch 1, step 3")
    assert Storage(place).read_json("status.json")["checkpoint"] == "stage 2, epoch 1, step 3"
    reporter.ended("failed: the disk is full")
    assert Storage(place).read_json("status.json")["phase"] == "failed: the disk is full"
    assert activity_of(Storage(place).read_json("status.json")) == ("failed: the disk is full", 0, None, "")


@pytest.mark.parametrize("phase", ["stage 2", "evaluate", "start", "encode the training images"])
def test_a_run_without_a_sign_of_life_has_no_time_left(phase):
    status = {"phase": phase, "updated": 1000.0, "restarts": 0, "nodes": {"a": 1}, "workers": 1, "images_per_s": 9.0}
    if phase == "stage 2":
        status |= {"stage": 2, "epoch": 1, "epochs": 5, "step": 7, "steps_left": 9, "loss": 0.5, "seconds_left": 1512}
    alive, dead = ("\n".join(summary(status, 1000 + age)) for age in (LIFELESS_S - 1, LIFELESS_S + 12))
    assert ("time left" in alive) == (phase == "stage 2") and "no sign of life" not in alive
    assert f"no sign of life for 0:01:12; probably ended in {phase}" in dead
    assert "left" not in dead and "images/s" not in dead


@pytest.mark.parametrize("phase", ["finished", "stopped", "failed: the disk is full"])
def test_a_run_that_said_how_it_ended_is_not_missed(phase):
    status = {"phase": phase, "updated": 0.0, "restarts": 0, "nodes": {"a": 1}, "workers": 1}
    assert summary(status, 1e6)[0].split() == ["doing:", *phase.split()]


def test_a_run_says_that_it_lives_while_it_has_no_news_until_it_ends(place, monkeypatch):
    monkeypatch.setattr("cluster.run.run_folder.BEAT_S", 0.04)
    place += "-of-its-own"  # Where no run of another test beats still.
    reporter = RunReporter(config_at(place), None, {"host": 1})

    def updates():
        seen = set()
        until = time.monotonic() + 0.5
        while time.monotonic() < until and len(seen) < 4:
            seen.add(Storage(place).read_json("status.json")["updated"])
            time.sleep(0.01)
        return len(seen)

    reporter.phase("re-rank")
    assert updates() == 4
    reporter.ended("stopped")
    assert updates() == 1 and Storage(place).read_json("status.json")["phase"] == "stopped"
    reporter.close()
