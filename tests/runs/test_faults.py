"""The fault matrix: whatever is killed, cut or damaged, the run ends with the weights of one that was left alone.

A core set is part of `make test`; the rest runs with `make test-faults`. Times of kills are random, their seed is
printed. Faults of nodes are in test_node_faults.py.
"""

import contextlib
import json
import shutil
import signal
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from safetensors.torch import load_file

from cluster.run.manifest import read_manifests
from cluster.run.storage import Storage
from tests.helpers.faults import (
    LONGER,
    Job,
    Torchrun,
    assert_same_result,
    flip_byte_of_an_image,
    keep_full,
    kill_worker,
    kill_worker_while,
    seeded,
    small_disk,
    stop_at,
)
from tests.helpers.runs import config_file, launch, overrides, read_log, steps, train
from tests.runs.test_runs import assert_same_losses

pytestmark = pytest.mark.faults
core = pytest.mark.core


@pytest.fixture(scope="module")
def undisturbed(tiny_shards, tmp_path_factory):
    """The run of two workers that every other one is held against."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Torchrun(2, folder, tiny_shards)
    run.end()
    return run.run_dir


@pytest.fixture
def job(tiny_shards, tmp_path, ray_head):
    return Job(tmp_path, tiny_shards, ray_head.environment)


# --- SIGKILL of a worker


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=core)])
def test_a_killed_worker_costs_a_restart_and_nothing_else(job, ray_head, undisturbed, stage):
    dice = seeded(f"worker in stage {stage}")
    job.wait_for_step(stage, dice.randint(1, 18))
    last, killed_s = job.last_step(), time.monotonic()
    kill_worker(ray_head.process.pid, dice)
    job.report_restart(killed_s, last)
    text = job.end()
    assert "Traceback" not in text
    assert job.status()["restarts"] == 1
    assert_same_result(undisturbed, job.run_dir)


# --- SIGTERM, SIGKILL of the driver


@core
def test_sigterm_saves_exits_143_and_the_same_command_goes_on(job, tiny_shards, tmp_path, ray_head, undisturbed):
    job.wait_for_step(2, seeded("job in stage 2").randint(1, 8))
    job.process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in job.end(code=143)
    (stage, step), status = job.last_step(), job.status()
    assert status["phase"] == "stopped"
    assert status["checkpoint"].startswith(f"stage {stage},") and status["checkpoint"].endswith(f"step {step}")
    assert Job(tmp_path, tiny_shards, ray_head.environment).end()
    assert_same_result(undisturbed, job.run_dir)


def test_a_run_that_cannot_be_placed_says_so_and_can_be_stopped(tiny_shards, tmp_path, ray_head):
    job = Job(tmp_path, tiny_shards, ray_head.environment, cluster__placement="STRICT_SPREAD")
    job.wait_until(lambda: "room for 1); waiting for more" in job.text())
    time.sleep(5)  # Into the wait itself.
    job.process.send_signal(signal.SIGTERM)
    assert "stopped while no worker was running" in job.end(timeout_s=60, code=143)
    assert not (job.run_dir / "stop-request").exists()


@pytest.mark.parametrize("moment", ["stage 1", pytest.param("stage 2", marks=core), "between stages"])
def test_after_a_killed_driver_the_same_command_goes_on(job, tiny_shards, tmp_path, ray_head, undisturbed, moment):
    dice = seeded(f"driver in {moment}")
    if moment == "between stages":
        job.wait_until((job.run_dir / "stage1.safetensors").exists)
    else:
        job.wait_for_step(int(moment[-1]), dice.randint(1, 18))
    last, killed_s = job.last_step(), time.monotonic()
    job.process.kill()
    job.process.wait()
    again = Job(tmp_path, tiny_shards, ray_head.environment)
    again.report_restart(killed_s, last)
    again.end()
    assert_same_result(undisturbed, job.run_dir)


def test_a_worker_killed_in_an_evaluation(tiny_shards, tmp_path, ray_head, undisturbed):
    dice = seeded("worker in evaluation")
    job = Job(tmp_path, tiny_shards, ray_head.environment, eval__every_epochs=1)
    phase = dice.choice([f"evaluate epoch {epoch}" for epoch in range(1, LONGER["stage2__epochs"])] + ["evaluate"])
    job.wait_until(lambda: job.status().get("phase") == phase)
    kill_worker(ray_head.process.pid, dice)
    job.end()
    assert_same_result(undisturbed, job.run_dir)


def test_a_worker_killed_while_a_checkpoint_is_written(job, ray_head, undisturbed):
    dice = seeded("worker in a checkpoint")
    job.wait_for_step(dice.randint(1, 2), dice.randint(1, 15))
    job.wait_until(
        lambda: job.unfinished_checkpoint() and kill_worker_while(job.unfinished_checkpoint, ray_head.process.pid, dice)
    )
    job.end()
    assert_same_result(undisturbed, job.run_dir)


def ten_moments(dice):
    """(stage, step) of five steps in each stage, in their order."""
    return [(stage, step) for stage, last in ((1, 22), (2, 36)) for step in sorted(dice.sample(range(1, last), 5))]


def test_ten_workers_killed_in_one_run(tiny_shards, tmp_path, ray_head, undisturbed):
    """Two of them while a checkpoint is written, two in an evaluation."""
    dice = seeded("ten workers")
    job = Job(tmp_path, tiny_shards, ray_head.environment, cluster__max_failures=-1, eval__every_epochs=1)
    moments = {3: job.unfinished_checkpoint, 7: job.evaluates, 9: job.unfinished_checkpoint, 10: job.evaluates}
    for count, (stage, step) in enumerate(ten_moments(dice), start=1):
        job.wait_for_step(stage, step)
        moment = moments.get(count, lambda: True)
        job.wait_until(lambda: moment() and kill_worker_while(moment, ray_head.process.pid, dice))  # noqa: B023
        last, killed_s = job.last_step(), time.monotonic()
        job.report_restart(killed_s, last, count)
    job.end()
    assert job.status()["restarts"] == 10
    assert_same_result(undisturbed, job.run_dir)


def test_ten_drivers_killed_in_one_run(tiny_shards, tmp_path, ray_head, undisturbed):
    """The sixth between the stages."""
    job = Job(tmp_path, tiny_shards, ray_head.environment)
    for count, (stage, step) in enumerate(ten_moments(seeded("ten drivers")), start=1):
        if count == 6:
            job.wait_until((job.run_dir / "stage1.safetensors").exists)
        else:
            job.wait_for_step(stage, step)
        last, killed_s = job.last_step(), time.monotonic()
        job.process.kill()
        job.process.wait()
        job = Job(tmp_path, tiny_shards, ray_head.environment)
        job.report_restart(killed_s, last, count)
    job.end()
    assert job.status()["restarts"] == 10
    assert_same_result(undisturbed, job.run_dir)


# --- what one sees of it


def test_status_and_metrics_tell_what_a_run_does(job, ray_head):
    job.wait_until(lambda: job.status().get("phase") == "stage 2")
    shown = launch("status.py", job.run_dir).stdout
    assert "all workers: python" in job.text() and "torch" in job.text()
    for line in ("stage 2", "time left", "last checkpoint: stage 2", "restarts:        0", "workers:         2 ("):
        assert line in shown
    job.end()
    assert "doing:           finished" in launch("status.py", job.run_dir, "--every", 1).stdout
    pages = [scrape(target) for target in metrics_targets(ray_head.folder)]
    for name in ("loss", "step", "images_per_s", "restarts"):
        assert any(f"ray_clipreid_{name}{{" in page and f'run="{job.run_dir}"' in page for page in pages), name


def metrics_targets(folder):
    """Where Ray tells Prometheus to look."""
    discovered = json.loads((Path(folder) / "prom_metrics_service_discovery.json").read_text())
    return [target for group in discovered for target in group["targets"]]


def scrape(target):
    with contextlib.suppress(OSError), urlopen(f"http://{target}/metrics", timeout=5) as answer:
        return answer.read().decode()
    return ""


# --- storage


@pytest.fixture(scope="module")
def interrupted(tiny_shards, tmp_path_factory):
    """A run of two workers that was stopped in stage 2, with two checkpoints."""
    folder = tmp_path_factory.mktemp("interrupted")
    stop_at(Torchrun(2, folder, tiny_shards), 2, 9)
    return folder / "run"


@pytest.mark.parametrize("damage", ["truncated", pytest.param("flipped", marks=core), "no manifest"])
def test_a_damaged_newest_checkpoint_is_passed_over(tiny_shards, tmp_path, interrupted, undisturbed, damage):
    shutil.copytree(interrupted, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    victim = newest / "rank-1-of-2.safetensors"
    content = bytearray(victim.read_bytes())
    if damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "truncated":
        victim.write_bytes(content[:-100])
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    again = Torchrun(2, tmp_path, tiny_shards)
    again.end()
    assert damage == "no manifest" or newest.name in again.text()
    assert_same_result(undisturbed, again.run_dir)
    assert not newest.exists()


def test_another_run_goes_on_from_a_named_checkpoint_as_its_own_would(tiny_shards, tmp_path, interrupted, undisturbed):
    newest = max((interrupted / "checkpoints").iterdir())
    assert newest.name.startswith("stage2")
    run = Torchrun(2, tmp_path, tiny_shards, run__resume=newest)
    run.end()
    for name in ("model.safetensors", "stage1.safetensors", "metrics.json"):
        assert (undisturbed / name).read_bytes() == (run.run_dir / name).read_bytes(), name


def test_a_run_that_began_with_other_weights_is_not_gone_on_with(tiny_shards, tmp_path, interrupted):
    shutil.copytree(interrupted, tmp_path / "run")
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"encoder": "another"}))
    settings = overrides(tiny_shards, tmp_path / "run", **LONGER, cluster__launcher="local")
    refused = train(config_file(tmp_path), *settings, check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "error: model.pretrained: None gives image encoder" in refused.stderr and "another" in refused.stderr


def test_a_full_disk_stops_the_run_with_a_clear_error_and_the_run_goes_on_when_there_is_room(
    tiny_shards, tmp_path, ray_head, undisturbed
):
    with small_disk(tmp_path / "disk", 40_000_000) as disk:
        changes = {"run_dir": disk / "run"}
        job = Job(tmp_path, tiny_shards, ray_head.environment, **changes)
        job.wait_for_step(2, seeded("full disk in stage 2").randint(1, 20))
        keep_full(job, disk / "ballast", leave=100_000)
        text = job.end(code=1)
        assert "error: the checkpoint could not be written" in text
        assert "No space left" in text and "is intact" in text
        (disk / "ballast").unlink()
        assert all((folder / "manifest.json").exists() for folder in (disk / "run" / "checkpoints").iterdir())
        Job(tmp_path, tiny_shards, ray_head.environment, **changes).end()
        assert_same_result(undisturbed, job.run_dir)


def test_four_then_two_then_one_then_two_workers(tiny_shards, tmp_path, undisturbed):
    dice = seeded("numbers of workers")
    stop_at(Torchrun(4, tmp_path, tiny_shards), 1, dice.randint(2, 15))
    stop_at(Torchrun(2, tmp_path, tiny_shards), 2, dice.randint(2, 8))
    stop_at(Torchrun(1, tmp_path, tiny_shards), 2, dice.randint(14, 20))
    last = Torchrun(2, tmp_path, tiny_shards)
    last.end()
    assert last.status()["restarts"] == 3
    assert_same_losses(read_log(undisturbed), read_log(last.run_dir))


# --- data and numbers


def test_a_record_that_rots_during_a_run_is_named_and_nothing_is_lost(tiny_shards, tmp_path, ray_head, undisturbed):
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    job = Job(tmp_path, shards, ray_head.environment)
    job.wait_for_step(2, seeded("rotten record in stage 2").randint(1, 10))
    shard, key = flip_byte_of_an_image(shards)
    text = job.end(code=2)
    assert shard in text and key in text and "error: " in text
    flip_byte_of_an_image(shards)
    Job(tmp_path, shards, ray_head.environment).end()
    assert_same_result(undisturbed, job.run_dir)


def test_a_loss_that_is_not_finite_stops_before_it_harms_and_repeats_exactly(tiny_shards, tmp_path):
    changes = {"cluster.launcher": "local", "stage2.lr": "1e30", "stage2.warmup_epochs": 0}
    settings = [*overrides(tiny_shards, tmp_path / "run", **LONGER), *(f"{k}={v}" for k, v in changes.items())]
    ends = [train(config_file(tmp_path), *settings, check=False) for _ in range(2)]
    log = read_log(tmp_path / "run")
    assert [done.returncode for done in ends] == [1, 1]
    stage, _, step = steps(log)[-1]
    for done in ends:
        assert f"error: stage {stage}, epoch 1, step {step + 1}: " in done.stderr
        assert "is not finite" in done.stderr and "identities of the batch: 00" in done.stderr
    assert len(set(steps(log))) == len(log)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["phase"].startswith(f"failed: stage {stage}, epoch 1, step {step + 1}: ")
    newest = read_manifests(Storage(tmp_path / "run"))[0][-1]
    assert (newest.position.stage, newest.position.step) == (stage, step)
    for name in newest.files:
        values = load_file(tmp_path / "run" / "checkpoints" / newest.name / name)
        assert all(value.isfinite().all() for value in values.values())
