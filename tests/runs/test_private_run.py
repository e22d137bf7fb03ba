"""A run on one machine, as the machine's other users see it: what listens where, and what they can read."""

import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.helpers.faults import Job
from tests.helpers.runs import BIN, environment, free_ports

pytestmark = pytest.mark.skipif(not shutil.which("ss"), reason="needs ss, of iproute2")


def listening(pid):
    """(address, name of the process) of every TCP port that a process or one below it listens on."""
    family = {process.pid for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]}
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    found = []
    for line in lines:
        owners = re.findall(r'\("([^"]*)",pid=(\d+)', line)
        found += [(line.split()[3], name) for name, owner in owners if int(owner) in family]
    return found


def is_loopback(address):
    return address.rpartition(":")[0] in ("127.0.0.1", "[::ffff:127.0.0.1]", "[::1]")


@pytest.fixture
def shared_place():
    """A temporary folder that all users of the machine share, with a short name, as sockets need."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def test_a_local_ray_listens_on_the_loopback_alone_and_nobody_else_reads_its_token_or_files(
    tiny_shards, tmp_path, shared_place
):
    """But for torch's rendezvous store, which cannot: its port is open while two workers train together."""
    home = tmp_path / "home"
    home.mkdir()
    job = Job(tmp_path, tiny_shards, environment(HOME=str(home), RAY_TMPDIR=str(shared_place)))
    job.wait_for_step(1, 1)
    found = listening(job.process.pid)
    token = home / ".ray" / "auth_token"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (token, token.parent, *shared_place.iterdir())]
    job.process.terminate()
    job.end(code=143)
    others = [(address, name) for address, name in found if not is_loopback(address)]
    assert [name.startswith("ray::") for _, name in others] == [True], found
    assert {"raylet", "gcs_server"} <= {name for _, name in found}
    assert modes == [0o600, 0o700, 0o700] and len(token.read_text()) == 64
    assert [path.name for path in shared_place.iterdir()] == [f"ray-{os.getuid()}"]


def test_under_torchrun_only_torchruns_own_store_listens_beyond_the_loopback(tiny_shards, tmp_path):
    (port,) = free_ports(1)

    class TorchrunJob(Job):
        start = (str(BIN / "torchrun"), "--nproc-per-node=2", f"--master-port={port}")

    job = TorchrunJob(tmp_path, tiny_shards, environment(), cluster__launcher="torchrun")
    job.wait_for_step(1, 1)
    found = listening(job.process.pid)
    job.process.terminate()
    job.end(code=None)
    assert [address for address, _ in found if not is_loopback(address)] == [f"*:{port}"], found
    assert len(found) > 1
