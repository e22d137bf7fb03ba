"""Ctrl-C under every launcher: a checkpoint of the last step, a word on how to go on, and the exit code of Ctrl-C."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.runs import BIN, ROOT, config_file, environment, overrides, read_log

ENDLESS = {"stages": "[1]", "stage1__epochs": 100_000, "checkpoint__every_steps": 0, "checkpoint__every_epochs": 0}
"""No checkpoint is due while it runs."""


@pytest.fixture
def start(tiny_shards, tmp_path):
    """Start a run in a process group of its own, as a terminal does; it has made some steps when it is given back."""
    started = []

    def run(launcher, env=None):
        program = [sys.executable]
        if launcher == "torchrun":
            program = [BIN / "torchrun", "--standalone", "--nproc-per-node=2"]
        workers = 2 if launcher == "torchrun" else 1
        settings = overrides(
            tiny_shards, tmp_path / "run", cluster__launcher=launcher, cluster__workers=workers, **ENDLESS
        )
        command = [*program, ROOT / "launch" / "train.py", "--config", config_file(tmp_path), *settings]
        log = tmp_path / "run" / "log.jsonl"
        before = len(read_log(tmp_path / "run")) if log.exists() else 0
        with (tmp_path / "output").open("w") as output:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=env or environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        until = time.monotonic() + 120
        while not log.exists() or log.read_text().count("\n") < before + 3:
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "output").read_text()[-3000:]
            time.sleep(0.05)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def after_ctrl_c(process, folder):
    """Exit code, what was printed, and the steps logged."""
    os.killpg(process.pid, signal.SIGINT)
    code = process.wait(60)
    return code, (folder / "output").read_text(), [entry["step"] for entry in read_log(folder / "run")]


@pytest.mark.parametrize("launcher", ["local", pytest.param("torchrun", marks=pytest.mark.faults), "ray"])
def test_ctrl_c_saves_the_last_step_and_says_how_to_go_on(launcher, start, tmp_path, request):
    env = request.getfixturevalue("ray_head").environment if launcher == "ray" else None
    code, text, steps = after_ctrl_c(start(launcher, env), tmp_path)
    # torchrun itself ends with its own code and story, after its workers have ended well.
    assert code == (1 if launcher == "torchrun" else 130), text[-3000:]
    assert text.count("repeat the command to go on") == 1 and "the same command goes on from it" in text
    assert launcher == "torchrun" or "Traceback" not in text
    saved = [path.name.rpartition("-")[0] for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [f"stage1-{steps[-1]:08d}"]
    assert '"phase": "stopped"' in (tmp_path / "run" / "status.json").read_text()


@pytest.mark.faults
def test_the_same_command_goes_on_after_ctrl_c(start, tmp_path):
    for _ in range(2):
        code, text, steps = after_ctrl_c(start("local"), tmp_path)
        assert code == 130, text[-3000:]
        assert steps == list(range(1, len(steps) + 1))
