"""Whole runs from the command line: every launcher, stages apart, an interrupted run, a submitted job."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.helpers.runs import BIN, ROOT, config_file, environment, overrides, read_log, steps, train
from tests.helpers.tolerances import within

LOSS_KEYS = ("loss", "i2t", "t2i", "id_img", "tri_pre", "tri_proj", "i2tce")


def assert_same_losses(one, other, tolerance=1e-4):
    assert steps(one) == steps(other)
    for a, b in zip(one, other, strict=True):
        for key in LOSS_KEYS:
            if key in a:
                within(abs(a[key] - b[key]) / max(abs(a[key]), 1e-3), tolerance, (a["stage"], a["step"], key))


@pytest.fixture(scope="module")
def local_run(tiny_shards, tmp_path_factory):
    """One run in a single process, which the others are held against."""
    folder = tmp_path_factory.mktemp("local")
    config = config_file(folder)
    done = train(config, *overrides(tiny_shards, folder / "run", cluster__launcher="local"))
    return folder / "run", done


def test_a_run_leaves_what_its_user_looks_for(local_run):
    run, done = local_run
    assert "train 48 images of 8 identities" in done.stdout
    assert "untrained" in done.stdout and "after stage 2" in done.stdout and str(run) in done.stdout
    assert "images/s" in done.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    for part in (metrics, metrics["untrained"]):
        assert {"mAP", "mINP", "R1", "R5", "R10", "queries", "valid_queries"} <= part.keys()
        assert 0 < part["mAP"] <= 1
    log = read_log(run)
    assert {"stage", "epoch", "step", "loss", "lr", "images_per_s"} <= log[0].keys()
    assert steps(log)[:3] == [(1, 1, 1), (1, 1, 2), (1, 1, 3)]
    for name in ("config.yaml", "stage1.safetensors", "model.safetensors", "checkpoints", "tensorboard"):
        assert (run / name).exists()


def test_a_finished_run_is_not_done_again(local_run, tiny_shards):
    run, _ = local_run
    before = (run / "log.jsonl").stat().st_mtime_ns
    again = train(config_file(run.parent), *overrides(tiny_shards, run, cluster__launcher="local"))
    assert "finished before" in again.stdout and "after stage 2" in again.stdout
    assert (run / "log.jsonl").stat().st_mtime_ns == before


def test_torchrun_with_two_processes_logs_the_losses_of_one(local_run, tiny_shards, tmp_path):
    command = [str(BIN / "torchrun"), "--nproc-per-node=2", "--standalone", "launch/train.py", "--config"]
    settings = overrides(tiny_shards, tmp_path / "run", cluster__launcher="torchrun")
    done = subprocess.run(
        [*command, str(config_file(tmp_path)), *settings], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deprecated" not in done.stderr and "****" not in done.stderr  # OMP_NUM_THREADS is set, as README has it
    assert_same_losses(read_log(local_run[0]), read_log(tmp_path / "run"))


def test_ray_with_two_workers_logs_the_losses_of_one(local_run, tiny_shards, tmp_path, ray_head):
    done = train(config_file(tmp_path), *overrides(tiny_shards, tmp_path / "run"), env=ray_head.environment)
    assert not [line for line in done.stderr.splitlines() if "core_worker" in line or "Watcher" in line]
    assert_same_losses(read_log(local_run[0]), read_log(tmp_path / "run"))


def test_stage_2_starts_from_the_result_of_an_earlier_stage_1(local_run, tiny_shards, tmp_path):
    config, local = config_file(tmp_path), {"cluster__launcher": "local"}
    train(config, *overrides(tiny_shards, tmp_path / "one", stages="[1]", **local))
    result = tmp_path / "one" / "stage1.safetensors"
    train(config, *overrides(tiny_shards, tmp_path / "two", stages="[2]", stage1__result=result, **local))
    whole, apart = load_file(local_run[0] / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors")
    assert all((whole[name] == apart[name]).all() for name in whole)


def test_stage_2_refuses_the_result_of_another_encoder(local_run, tiny_shards, tmp_path):
    settings = overrides(
        tiny_shards,
        tmp_path / "run",
        stages="[2]",
        run__seed=5,
        cluster__launcher="local",
        stage1__result=local_run[0] / "stage1.safetensors",
    )
    done = train(config_file(tmp_path), *settings, check=False)
    assert done.returncode == 2
    assert "was learned with image encoder" in done.stderr and "Traceback" not in done.stderr


def test_a_submitted_job_trains_and_its_exit_status_is_right(tiny_shards, tmp_path, ray_head):
    def submit(*settings):
        command = [str(BIN / "ray"), "job", "submit", f"--address={ray_head.dashboard}", "--working-dir", ".", "--"]
        entry = [sys.executable, "launch/train.py", "--config", "configs/demo.yaml", *settings]
        return subprocess.run([*command, *entry], cwd=ROOT, env=ray_head.environment, capture_output=True, text=True)

    settings = overrides(tiny_shards, tmp_path / "run", stage1__epochs=1, stage2__epochs=1)
    done = submit(*settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["untrained"]
    refused = submit("stage2.idenities=4")
    assert refused.returncode == 1
    assert "did you mean stage2.identities" in refused.stdout + refused.stderr


def test_the_upload_of_a_job_is_small(tmp_path):
    """What Ray packs: the working folder without what .gitignore and .rayignore name."""
    from ray._private.runtime_env.packaging import create_package

    create_package(str(ROOT), tmp_path / "upload.zip", include_gitignore=True)
    assert (tmp_path / "upload.zip").stat().st_size < 5_000_000
