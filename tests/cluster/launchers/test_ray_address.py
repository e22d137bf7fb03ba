"""A Ray cluster that is not there is one line with cause and remedy, in seconds; so is what ended a worker."""

import socket
import subprocess
import sys
import time

import pytest

from cluster.errors import ConfigError
from cluster.launchers.ray_address import cause_of, check_address
from tests.helpers.runs import ROOT, config_file, environment, free_ports, launch, overrides


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "address of a dashboard"),
        ("https://user:secret@ray.example:8265", "address of a dashboard"),
        ("127.0.0.1", "is not HOST:PORT"),
        ("127.0.0.1:many", "is not HOST:PORT"),
        ("127.0.0.1:99999", "is not HOST:PORT"),
        ("127.0.0.1:PORT", "connection refused"),
        ("[::1]:PORT", "no Ray cluster answers there"),
        ("no-such-host.invalid:6379", "no-such-host.invalid: "),
        ("auto", "the last cluster of this machine"),
    ],
)
def test_an_address_where_no_cluster_can_be_is_refused_in_one_line_with_the_remedy(
    address, words, tmp_path, monkeypatch
):
    port = str(free_ports(1)[0])
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(ConfigError, match="RAY_ADDRESS=") as caught:
        check_address(address.replace("PORT", port), answer_s=0.5)
    assert words in str(caught.value) and "unset RAY_ADDRESS" in str(caught.value) and "\n" not in str(caught.value)
    assert "secret" not in str(caught.value) and time.monotonic() - start < 30


def test_an_address_that_answers_is_left_to_ray():
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}", answer_s=0)
    check_address("local")


def test_what_answers_and_is_no_ray_ends_the_process_in_one_line():
    code = (
        "import time; from cluster.launchers.ray_address import within_time\n"
        "with within_time('RAY_ADDRESS=x:1', 0.3): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr == (
        "error: RAY_ADDRESS=x:1: no answer for 0 s, so no Ray cluster; unset RAY_ADDRESS to start Ray on this machine\n"
    )


KILLED = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.2, ID: ab) where the task (actor ID: cd) was running was 30.1GB / 31.0GB (0.97), which
exceeds the memory usage threshold of 0.95.
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/oom.
To adjust the kill threshold, set the environment variable `RAY_memory_usage_threshold` when starting Ray."""
DEAD = """The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
\tactor_id: ab
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: killed
"""
RAISED = """ray::train() (pid=1)
Traceback (most recent call last):
  File "x.py", line 3, in train
ValueError: it was that"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (KILLED, ("ran out of memory", "running low on memory", "data.loaders")),
        (DEAD.replace("killed", "NODE_OUT_OF_MEMORY"), ("ran out of memory",)),
        (DEAD, ("is dead because its worker process has died",)),
        (RAISED, ("ValueError: it was that",)),
        ("", ("no reason given",)),
    ],
)
def test_of_rays_story_the_line_that_names_the_cause_is_kept(text, words):
    cause = cause_of(text)
    assert "\n" not in cause and all(word in cause for word in words), cause


@pytest.mark.slow
def test_a_run_with_the_address_of_a_dead_cluster_ends_within_half_a_minute(tiny_shards, tmp_path):
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = ["--config", config_file(tmp_path), *overrides(tiny_shards, tmp_path / "run")]
    done = launch("train.py", *command, check=False, env=environment(RAY_ADDRESS=address), timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and f"RAY_ADDRESS={address}" in errors[0], done.stderr
    assert "Traceback" not in done.stderr
