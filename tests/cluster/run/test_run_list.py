"""status.py of a folder of runs: a line each, and mAP of one; and bars that end where they should."""

import io
import json
import time

import fsspec
import pytest
from rich.console import Console
from rich.progress import Progress

from cluster.errors import ConfigError
from cluster.run.manifest import Position
from cluster.run.reporter import RunReporter
from cluster.run.run_list import UNREADABLE, list_runs, runs_table
from cluster.run.status_view import LIFELESS_S, WAITING, _Bars, activity_of
from cluster.run.storage import Storage
from cluster.settings.yaml_file import parse_config
from launch import status as program


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path):
    yield str(tmp_path) if request.param == "local" else "memory://bucket/runs"
    fsspec.filesystem("memory").store.clear()


def figures(mAP):
    return {"mAP": mAP, "R1": 0.5, "R5": 0.6, "R10": 0.7}


def reporter_at(place, position=None):
    return RunReporter(parse_config({"data": {"shards": "x"}, "run": {"dir": place}}), position, {"host": 1})


def write_runs(place):
    """finished, living, lifeless and damaged ones, and a folder that is none."""
    finished = reporter_at(f"{place}/finished")
    for epoch, mAP in ((10, 0.5), (20, 0.7), (30, 0.6)):
        finished.epoch(2, epoch, figures(mAP))
    finished.metrics({**figures(0.65), "untrained": figures(0.1)})
    finished.finished()
    for name in ("living", "lifeless"):
        run = reporter_at(f"{place}/{name}")
        run.metrics({"untrained": figures(0.1)})
        run.phase("evaluate the untrained encoder")
        run.close()
    finished.close()
    lifeless = Storage(f"{place}/lifeless")
    facts = lifeless.read_sealed("status.json")
    lifeless.write_sealed("status.json", facts | {"updated": time.time() - LIFELESS_S - 100})
    Storage(f"{place}/damaged").write("config.yaml", b"{}")
    Storage(f"{place}/damaged").write("status.json", b"{")
    Storage(f"{place}/other").write("notes.txt", b"")


def test_every_run_of_a_folder_has_a_line(place):
    write_runs(place)
    lines = {line.name: line for line in list_runs(Storage(place), time.time())}
    assert list(lines) == ["damaged", "finished", "lifeless", "living"]
    assert {name: line.state for name, line in lines.items()} == {
        "damaged": UNREADABLE,
        "finished": "finished",
        "lifeless": "no sign of life; was in: evaluate the untrained encoder",
        "living": "evaluate the untrained encoder",
    }
    assert lines["damaged"].age_s is None and lines["living"].age_s < 60 and lines["lifeless"].age_s > LIFELESS_S
    assert lines["finished"].mAP == (0.7, 20, 0.65)
    assert {lines[name].mAP for name in ("damaged", "lifeless", "living")} == {(None, None, None)}
    assert {name for name, line in lines.items() if not line.is_over} == {"living"}
    table = io.StringIO()
    Console(file=table, width=200).print(runs_table(list(lines.values())))
    assert "70.0 (epoch 20)" in table.getvalue() and "65.0" in table.getvalue()


def test_the_program_shows_a_folder_of_runs_and_the_mAP_of_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write_runs(str(tmp_path))
    program.main([str(tmp_path)])
    assert "no sign of life; was in" in capsys.readouterr().out
    program.main([str(tmp_path), "--json"])
    shown = {run["name"]: run for run in json.loads(capsys.readouterr().out)}
    assert shown["finished"]["best_mAP"] == 0.7 and shown["finished"]["final_mAP"] == 0.65
    program.main([str(tmp_path / "finished")])
    assert "mAP:             65.0, best 70.0 (epoch 20)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no runs below it"):
        program.main([str(tmp_path / "other")])


def test_the_best_epoch_outlives_a_restart_but_not_a_new_beginning(place):
    for position, kept in ((Position(2, 1, 1, 1, True), True), (None, False)):
        run = reporter_at(f"{place}/run")
        run.epoch(2, 1, figures(0.4))
        run.close()
        again = reporter_at(f"{place}/run", position)
        again.close()
        assert ("best" in Storage(f"{place}/run").read_sealed("status.json")) is kept


def test_the_last_epoch_is_the_best_where_no_other_is_better(place):
    run = reporter_at(f"{place}/run")
    run.epoch(2, 5, figures(0.4))
    run.metrics(figures(0.6))
    run.close()
    (line,) = list_runs(Storage(place), time.time())
    assert line.mAP == (0.6, None, 0.6)


STEP = {"restarts": 0, "phase": "stage 2", "epoch": 1, "epochs": 2, "loss": 1.0, "step": 7, "steps_left": 3}


@pytest.mark.parametrize(("end", "completed"), [("finished", 10), ("failed: the disk is full", 7), ("stopped", 7)])
def test_bars_end_at_their_end_and_a_failed_one_where_it_was(end, completed):
    progress = Progress("{task.description}", console=Console(file=io.StringIO()))
    bars = _Bars(progress)
    bars.show({})
    bars.show({"restarts": 0, "phase": "evaluate the untrained encoder", "images": 40, "images_total": 48})
    bars.show({"restarts": 0, "phase": "first step of stage 2"})
    bars.show(STEP)
    bars.show(STEP | {"phase": end})
    bars.show(STEP | {"phase": end})
    bars.close()
    seen = [(task.description, task.completed, task.total) for task in progress.tasks if task.visible]
    assert seen == [
        ("evaluate the untrained encoder", 48, 48),
        ("stage 2, epoch 1/2, loss 1.000", completed, 10),
    ]
    assert all(task.stop_time is not None for task in progress.tasks)


def test_what_is_not_counted_has_no_total():
    for status in ({}, {"restarts": 0, "phase": "first step of stage 1"}, {"restarts": 0, "phase": "finished"}):
        assert activity_of(status).total is None and activity_of(status).text == status.get("phase", WAITING)


def test_a_pass_is_counted_in_its_own_images(place):
    run = reporter_at(f"{place}/run")
    run.phase("evaluate")
    run.folder._status_at_s = 0.0
    run.images(24, 96)
    run.close()
    assert activity_of(Storage(f"{place}/run").read_sealed("status.json"))[:3] == ("evaluate", 24, 96)
