"""Two of the same command into one place, so many seconds apart: one does its work as if it were alone, the other is
refused in one line, or finds the work done.

One distance for each way to start them is part of `make test`; twenty run with `make test-faults`.
"""

import subprocess
import sys
import time
import uuid

import numpy as np
import pytest

from shards import storage
from tests.helpers.faults import seeded
from tests.helpers.object_store import s3_server
from tests.helpers.runs import BIN, ROOT, config_file, environment, overrides

pytestmark = pytest.mark.faults
DISTANCES = [pytest.param(1, marks=pytest.mark.core, id="once"), pytest.param(20, id="twenty times")]
LAUNCHERS = {"local": (sys.executable,), "ray": (sys.executable,), "torchrun": (str(BIN / "torchrun"), "--standalone")}
SHORT = {"stage1__epochs": 1, "stage2__epochs": 1, "cluster__cpus_per_worker": 1}
RESULTS = ("model.safetensors", "stage1.safetensors", "metrics.json")


def together(command, distance_s, env, doing):
    """Start it twice. Whoever does not end with 0 was refused, in one line; one of them does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
    time.sleep(distance_s)
    second = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in (first, second)]
    assert 0 in [code for _, code in ends], ends
    for errors, code in ends:
        if code:
            (line,) = [line for line in errors.splitlines() if f"is {doing} there" in line]
            assert line.startswith("error: ")


def distances(count, most_s, name):
    dice = seeded(name)
    return [dice.uniform(0, most_s) for _ in range(count)]


def training(launcher, folder, shards, run_dir):
    start = [*LAUNCHERS[launcher], *(["--nproc-per-node=2"] if launcher == "torchrun" else [])]
    settings = overrides(shards, run_dir, **SHORT, cluster__launcher=launcher)
    return [*start, str(ROOT / "launch" / "train.py"), "--config", str(config_file(folder)), *settings]


def results(run_dir):
    """Of a run: its files, and its log but for the speed."""
    log = storage.read_text(storage.join(str(run_dir), "log.jsonl")).splitlines()
    lines = [line.partition('"images_per_s"')[0] for line in log]
    return [storage.read_bytes(storage.join(str(run_dir), name)) for name in RESULTS], lines


@pytest.fixture(scope="module")
def alone(tiny_shards, tmp_path_factory):
    """Results of one run by itself, with one worker and with two."""
    folder = tmp_path_factory.mktemp("alone")
    for launcher in ("local", "torchrun"):
        command = training(launcher, folder, tiny_shards, folder / launcher)
        subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    return {"local": results(folder / "local"), "torchrun": results(folder / "torchrun")}


@pytest.mark.parametrize("count", DISTANCES)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_of_two_trainings_one_is_as_if_alone(tiny_shards, tmp_path, alone, request, launcher, count):
    env = request.getfixturevalue("ray_head").environment if launcher == "ray" else environment()
    for turn, distance_s in enumerate(distances(count, 2.0, f"trainings by {launcher}")):
        run_dir = tmp_path / str(turn)
        together(training(launcher, tmp_path, tiny_shards, run_dir), distance_s, env, "training")
        assert results(run_dir) == alone["local" if launcher == "local" else "torchrun"]
        assert not (run_dir / ".owner").exists()


@pytest.mark.parametrize("count", DISTANCES)
def test_of_two_trainings_into_an_object_store_one_is_as_if_alone(tiny_shards, tmp_path, alone, count):
    with s3_server(f"runs-{uuid.uuid4().hex}") as bucket:
        for turn, distance_s in enumerate(distances(count, 2.0, "trainings into an object store")):
            run_dir = f"{bucket}/{turn}"
            together(training("local", tmp_path, tiny_shards, run_dir), distance_s, environment(), "training")
            assert results(run_dir) == alone["local"]
            assert ".owner" not in storage.list_folder(run_dir)


def build(images, out):
    command = ["launch/pack.py", "build", "--dataset", "veri776", "--root", str(images), "--noun", "vehicle"]
    return [sys.executable, *command, "--out", str(out)]


def contents(url):
    return {name: storage.read_bytes(storage.join(str(url), name)) for name in storage.list_folder(str(url))}


@pytest.mark.parametrize("count", DISTANCES)
@pytest.mark.parametrize("place", ["disk", "object store"])
def test_of_two_builds_one_is_as_if_alone(tiny_shards, tmp_path, place, count):
    with s3_server(f"builds-{uuid.uuid4().hex}") as bucket:
        for turn, distance_s in enumerate(distances(count, 1.0, f"builds on {place}")):
            out = tmp_path / str(turn) if place == "disk" else f"{bucket}/{turn}"
            together(build(tiny_shards.parent / "images", out), distance_s, environment(), "packing")
            assert contents(out) == contents(tiny_shards)


@pytest.mark.parametrize("count", DISTANCES)
def test_of_two_evaluations_one_is_as_if_alone(tmp_path, count):
    rng = np.random.default_rng(0)
    sides = {f"{side}_features": rng.normal(size=(500, 64)).astype(np.float32) for side in ("query", "gallery")}
    identities = {f"{side}_identities": np.arange(500) % 50 for side in ("query", "gallery")}
    np.savez(tmp_path / "features.npz", **sides, **identities)
    command = [sys.executable, "launch/evaluate.py", "--features", str(tmp_path / "features.npz"), "--rule", "none"]
    subprocess.run([*command, "--out", str(tmp_path / "alone.json")], cwd=ROOT, check=True, env=environment())
    for turn, distance_s in enumerate(distances(count, 1.0, "evaluations")):
        out = tmp_path / f"{turn}.json"
        together([*command, "--out", str(out)], distance_s, environment(), "evaluating")
        assert out.read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert not list(tmp_path.glob(".*.owner"))
