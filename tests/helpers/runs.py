"""Whole runs as a user starts them: a tiny packed dataset, `launch/train.py` in a process, and what it left behind."""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model.arch": "configs/models/tiny_vit.json",
    "model.pretrained": "null",
    "model.image_size": "[32,32]",
    "data.loaders": 0,
    "stage1.epochs": 2,
    "stage1.batch": 16,
    "stage2.epochs": 2,
    "stage2.identities": 4,
    "stage2.images_per_identity": 2,
    "stage2.lr": 1e-3,
    "augment.pad": 2,
    "eval.batch": 32,
    "checkpoint.every_steps": 3,
    "cluster.workers": 2,
    "cluster.timeout_s": 30,
}


def pack_tiny(folder):
    """A rendered dataset of 16 identities (8 to train on), packed; its URL."""
    images, shards = folder / "images", folder / "shards"
    launch("pack.py", "render", "--out", images, "--identities", 16, "--cameras", 4, "--images", 6)
    launch("pack.py", "build", "--dataset", "veri776", "--root", images, "--noun", "vehicle", "--out", shards)
    return shards


def launch(script, *arguments, check=True, env=None, **options):
    command = [sys.executable, str(ROOT / "launch" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env or environment(), cwd=ROOT, **options)
    assert not check or done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done


def train(config, *settings, check=True, env=None):
    return launch("train.py", "--config", config, *settings, check=check, env=env)


class RayHead:
    """`ray start --head` on this machine with its own ports and folder; `environment` joins commands to it."""

    def __init__(self, cpus=4):
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Short: sockets have short names.
        self.port, dashboard, agent = free_ports(3)
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.process = subprocess.Popen(
            [
                str(BIN / "ray"),
                "start",
                "--head",
                "--block",
                "--node-ip-address=127.0.0.1",
                f"--port={self.port}",
                f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={agent}",
                f"--num-cpus={cpus}",
                "--object-store-memory=100000000",
                f"--temp-dir={self.folder}",
            ],
            env=environment(**_AUTH, RAY_AUTH_TOKEN_PATH=str(_token(self.folder))),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.environment = environment(
            **_AUTH,
            RAY_AUTH_TOKEN_PATH=str(_token(self.folder)),
            RAY_ADDRESS=f"127.0.0.1:{self.port}",
            PATH=f"{BIN}:{os.environ['PATH']}",
        )
        wait_for_port(dashboard)

    def stop(self):
        """End the head and what it started, which is one process group each, by their ids."""
        for process in _descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_AUTH = {"RAY_AUTH_MODE": "token"}


def _token(folder):
    path = Path(folder) / "token"
    if not path.exists():
        path.write_text("0123456789abcdef" * 4)
        path.chmod(0o600)
    return path


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for_port(port, timeout_s=60):
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port}")


def _descendants(pid):
    """Ids of all processes below one, deepest last."""
    children = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def children_named(pid, text):
    """Descendants of a process whose command line holds the text."""
    return [p for p in _descendants(pid) if text in _command_line(p)]


def _command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def environment(**more):
    """What the tests' own environment sets for their process must not reach a user's command."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DS_ACCELERATOR", "RANK", "WORLD_SIZE")}
    if not more.keys() & {"HOME", "RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"}:
        # A Ray of the run's own: not with the token in the home of whoever runs the tests, which may be refused.
        kept["RAY_AUTH_TOKEN_PATH"] = f"{_own_folder().name}/auth_token"
    # Workers that Ray starts ahead lack the run's environment and are never used.
    return kept | {"OMP_NUM_THREADS": "1", "RAY_prestart_worker_first_driver": "0"} | more


@functools.cache
def _own_folder():
    """Closed to others, and removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="test-token-")


def overrides(shards, run_dir, **changes):
    settings = (
        TINY | {"data.shards": shards, "run.dir": run_dir} | {k.replace("__", "."): v for k, v in changes.items()}
    )
    return [f"{key}={value}" for key, value in settings.items()]


def config_file(folder):
    path = folder / "tiny.yaml"
    path.write_text("run: {seed: 0}\ndata: {shards: none}\n")
    return path


def read_log(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "log.jsonl").read_text().splitlines()]


def steps(log):
    return [(entry["stage"], entry["epoch"], entry["step"]) for entry in log]
