"""Whole runs whose files were damaged between two starts: what can be made again is; the rest is one line."""

import shutil

import pytest

from tests.helpers.runs import config_file, overrides, read_log, train

SHORT = {"cluster__launcher": "local", "stage1__epochs": 1, "stage2__epochs": 1}


@pytest.fixture(scope="module")
def finished(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(config_file(folder), *overrides(tiny_shards, folder / "run", **SHORT))
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path, tiny_shards):
    """A copy of the finished run, and the command that made it."""
    shutil.copytree(finished, tmp_path / "run")
    settings = overrides(tiny_shards, tmp_path / "run", **SHORT)
    return tmp_path / "run", lambda **options: train(config_file(tmp_path), *settings, **options)


def flip(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 4
    path.write_bytes(content)


def test_damaged_results_of_a_finished_run_are_made_again(run, finished):
    folder, again = run
    flip(folder / "model.safetensors", -9)
    (folder / "metrics.json").write_bytes(b"")
    (folder / "log.jsonl").write_bytes((folder / "log.jsonl").read_bytes()[:-30])
    said = again()
    assert "model.safetensors" in said.stderr and "made again" in said.stderr and "finished before" not in said.stdout
    for name in ("model.safetensors", "metrics.json", "stage1.safetensors"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name
    last = read_log(finished)[-1]
    assert f"log.jsonl lacks stage 2, steps {last['step']} to {last['step']}" in said.stderr
    assert read_log(folder) == read_log(finished)[:-1]
    assert "finished before" in again().stdout


def test_a_damaged_result_of_stage_1_is_refused_in_one_line_where_stage_2_goes_on(run):
    folder, again = run
    (folder / "status.json").write_bytes(b"")
    flip(folder / "stage1.safetensors", -9)
    said = again(check=False)
    assert said.returncode and "Traceback" not in said.stderr
    errors = [line for line in said.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "stage1.safetensors: " in errors[0] and "copy the file there from the run that wrote it" in errors[0]
