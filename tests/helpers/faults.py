"""Runs that are disturbed: a job in the background, moments to wait for, worker processes to kill, and what must be
the same afterwards."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers.runs import BIN, ROOT, children_named, config_file, environment, overrides, read_log, steps

LONGER = {
    "stage1__epochs": 8,
    "stage2__epochs": 8,
    "checkpoint__every_steps": 4,
    "cluster__timeout_s": 60,
    "cluster__cpus_per_worker": 1,
}
"""Long enough to be hit in the middle; a checkpoint is seldom more than a few steps old. One thread on every node."""
WEIGHTS = ("model.safetensors", "stage1.safetensors")


class Job:
    """`launch/train.py` in the background, as a user of a cluster starts it."""

    start = (sys.executable,)

    def __init__(self, folder, shards, env, enter=lambda command: command, **changes):
        self.run_dir = Path(changes.pop("run_dir", folder / "run"))
        self.output = folder / "output"
        settings = overrides(shards, self.run_dir, **LONGER | changes)
        script = [str(ROOT / "launch" / "train.py"), "--config", str(config_file(folder)), *settings]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                enter([*self.start, *script]), cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
            )

    def end(self, timeout_s=240, code=0):
        """Wait for the end; the output of all starts so far."""
        try:
            found = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"no end after {timeout_s} s: {self.status()} {self.text()[-3000:]}")
        assert code is None or found == code, f"exit code {found}, not {code}: {self.text()[-4000:]}"
        return self.text()

    def text(self):
        return self.output.read_text()

    def status(self):
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.run_dir / "status.json").read_text())
        return {}

    def last_step(self):
        """(stage, step) of the last complete line of the log; (0, 0) before the first."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            entry = json.loads((self.run_dir / "log.jsonl").read_text().rsplit("\n", 2)[-2])
            return entry["stage"], entry["step"]
        return 0, 0

    def wait_until(self, moment, timeout_s=180):
        """Poll until `moment()` is true; its value. The run must not end before."""
        until = time.monotonic() + timeout_s
        while not (value := moment()):
            assert self.process.poll() is None, f"the run ended before the moment: {self.text()[-3000:]}"
            assert time.monotonic() < until, f"not within {timeout_s} s: {self.status()} {self.text()[-3000:]}"
            time.sleep(0.002)
        return value

    def wait_for_step(self, stage, step):
        self.wait_until(lambda: self.last_step() >= (stage, step))

    def wait_for_restart(self, restarts=1, timeout_s=180):
        """Until steps are made after so many restarts."""
        before = ("start", "encode the training images", "evaluate the untrained encoder", "first step of stage")
        self.wait_until(
            lambda: (s := self.status()).get("restarts", 0) >= restarts and not s["phase"].startswith(before), timeout_s
        )

    def report_restart(self, killed_s, last_step, restarts=1):
        """Print what a fault cost; `last_step` as it was when it struck."""
        self.wait_for_restart(restarts)
        resumed = self.status()["resumed_from"] or "stage 0, epoch 0, step 0"
        stage, _, step = (int(part.split()[-1]) for part in resumed.split(","))
        lost = f"{max(0, last_step[1] - step)} steps" if stage == last_step[0] else f"from {resumed} to {last_step}"
        print(f"  training again after {time.monotonic() - killed_s:.1f} s, repeated {lost}")

    def evaluates(self):
        return self.status().get("phase", "").startswith("evaluate")

    def unfinished_checkpoint(self):
        """The folder of a checkpoint that is being written, if there is one."""
        for folder in (self.run_dir / "checkpoints").glob("*"):
            with contextlib.suppress(OSError):
                if not (folder / "manifest.json").exists():
                    return folder
        return None


class Torchrun(Job):
    """The same without Ray, started again by hand only."""

    def __init__(self, processes, folder, shards, **changes):
        self.start = (str(BIN / "torchrun"), f"--nproc-per-node={processes}", "--standalone")
        super().__init__(folder, shards, environment(), cluster__launcher="torchrun", **changes)


def stop_at(job, stage, step):
    """SIGTERM when a step is logged; the run saves and ends."""
    job.wait_for_step(stage, step)
    job.process.send_signal(signal.SIGTERM)
    job.end(code=None)
    assert job.status()["phase"] != "finished", "the run was faster than the signal"


def kill_worker(head_pid, dice):
    """SIGKILL one of the Ray workers below a process; its id."""
    victim = dice.choice(sorted(children_named(head_pid, "RayTrainWorker")))
    os.kill(victim, signal.SIGKILL)
    return victim


def kill_worker_while(moment, head_pid, dice):
    """SIGKILL a worker if `moment()` still holds with all workers halted. Whether it did."""
    workers = sorted(children_named(head_pid, "RayTrainWorker"))
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        if holds := bool(moment()):
            os.kill(dice.choice(workers), signal.SIGKILL)
    finally:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    return holds


def seeded(name):
    """Dice whose seed is printed, so that a failure can be repeated: FAULT_SEED=… pytest …"""
    seed = int(os.environ.get("FAULT_SEED", time.time_ns() % 1_000_000))
    print(f"{name}: FAULT_SEED={seed}")
    return random.Random(seed)


def assert_same_result(undisturbed, run_dir):
    """Weights and losses bit by bit, every step logged once."""
    expected, found = read_log(undisturbed), read_log(run_dir)
    assert steps(found) == steps(expected)
    for a, b in zip(expected, found, strict=True):
        assert {k: v for k, v in a.items() if k != "images_per_s"} == {
            k: v for k, v in b.items() if k != "images_per_s"
        }
    for name in WEIGHTS:
        assert (Path(undisturbed) / name).read_bytes() == (Path(run_dir) / name).read_bytes(), name
    one, other = (json.loads((Path(run) / "metrics.json").read_text()) for run in (undisturbed, run_dir))
    assert one == other


@contextlib.contextmanager
def small_disk(place, size_bytes):
    """A file system of its own at `place`, or the test is skipped."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs may not be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def keep_full(job, ballast, leave):
    """Write a file so that no more than so many bytes of its file system are free, until the job ends: what it removes
    leaves no room for what it writes."""
    until = time.monotonic() + 240
    while job.process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), ballast.open("ab") as file:
            file.write(bytes(max(0, shutil.disk_usage(ballast.parent).free - leave)))
        time.sleep(0.02)


def flip_byte_of_an_image(shards):
    """Change, or change back, one byte in the middle of a training image: (shard, key)."""
    row = pq.read_table(shards / "index.parquet").to_pylist()[5]
    assert row["split"] == "train"
    with (shards / row["shard"]).open("r+b") as file:
        place = row["offset"] + row["size"] // 2
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))
    return row["shard"], row["key"]
