"""Cluster files on two nodes for real, in network namespaces: the Slurm script, and `ray up`, with srun and ssh played.

Long, so among the fault tests; skipped where namespaces may not be made.
"""

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import runs
from tests.helpers.deploy import DEPLOY, ROOT, FakeSlurm, fake_ssh, start_script, wait_until
from tests.helpers.namespaces import network, why_unavailable
from tests.helpers.ray_nodes import Nodes

pytestmark = pytest.mark.faults

PROBE = '''
"""Stands in for launch/train.py: says which nodes it reached, then waits to be stopped."""
import json, os, signal, socket, sys, time
from pathlib import Path
import ray

stopped = []
ray.init(logging_level="ERROR")
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))  # After Ray, which has a handler of its own.
group = ray.util.placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")

@ray.remote(num_cpus=1)
def place():
    return socket.gethostname(), ray.util.get_node_ip_address(), os.environ["RAY_AUTH_MODE"]

strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
places = ray.get([place.options(scheduling_strategy=strategy(group, n)).remote() for n in range(2)])
print("probe at work", flush=True)
Path("report.tmp").write_text(json.dumps({"places": places, "arguments": sys.argv[1:], "driver": socket.gethostname()}))
Path("report.tmp").rename("report.json")
while not stopped:
    time.sleep(0.1)
Path("saved").write_text("checkpoint")
sys.exit(143)
'''


@pytest.fixture
def two_nodes(tmp_path):
    if reason := why_unavailable():
        pytest.skip(reason)
    with network(2, tmp_path, shared=[tmp_path.parent]) as nodes:
        yield nodes


def slurm_on(nodes, tmp_path: Path, cwd: Path) -> FakeSlurm:
    """Each node with one core of this machine."""
    cores = sorted(os.sched_getaffinity(0))
    lines = {
        node.name: f'exec taskset -c {cores[n % len(cores)]} {shlex.join(node.command([], cwd=cwd))} "$@"'
        for n, node in enumerate(nodes)
    }
    return FakeSlurm(tmp_path / "slurm", lines)


def test_slurm_script_makes_a_two_node_cluster_runs_its_job_and_leaves_nothing(tmp_path, two_nodes):
    checkout = tmp_path / "checkout"
    (checkout / "launch").mkdir(parents=True)
    (checkout / "launch" / "train.py").write_text(PROBE)
    (checkout / "cluster").symlink_to(ROOT / "cluster")
    slurm = slurm_on(two_nodes, tmp_path, checkout)
    script = start_script(checkout, slurm, "--config", "x.yaml", "stages=[1]")
    report = checkout / "report.json"
    wait_until(report.exists, 150, script, slurm)
    facts = json.loads(report.read_text())
    assert sorted(facts["places"]) == [["node1", "10.77.0.1", "token"], ["node2", "10.77.0.2", "token"]]
    assert facts["arguments"] == ["--config", "x.yaml", "stages=[1]"]
    assert facts["driver"] == "node1"

    jobs = ["ray", "job", "list", "--address=http://127.0.0.1:8265"]
    right = slurm.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(checkout / "secret" / "token"))
    wrong = slurm.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    assert "clipreid-4711" in two_nodes[0].run(jobs, env=right, check=True).stdout
    refused = two_nodes[0].run(jobs, env=wrong)
    assert refused.returncode != 0 and "token is invalid" in refused.stderr

    script.send_signal(signal.SIGTERM)
    assert script.wait(120) == 1, slurm.log()
    assert (checkout / "saved").exists(), slurm.log()
    assert slurm.calls()[-1] == "scontrol requeue 4711", slurm.log()
    assert "probe at work" in slurm.log()
    wait_until_empty(two_nodes)


def test_training_on_two_slurm_nodes_ends_with_the_weights_and_metrics_of_one_machine(tmp_path, two_nodes, tiny_shards):
    config, one, two = runs.config_file(tmp_path), tmp_path / "one", tmp_path / "two"
    slurm = slurm_on(two_nodes, tmp_path, ROOT)
    settings = runs.overrides(tiny_shards, two, cluster__placement="STRICT_SPREAD", cluster__cpus_per_worker=1)
    script = start_script(ROOT, slurm, "--config", str(config), *settings, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert script.wait(480) == 0, slurm.log()
    assert json.loads((two / "status.json").read_text())["nodes"] == {"node1": 1, "node2": 1}
    wait_until_empty(two_nodes)

    runs.train(config, *runs.overrides(tiny_shards, one, cluster__cpus_per_worker=1))
    assert_same_files(one, two)


def assert_same_files(one: Path, two: Path) -> None:
    for name in ("metrics.json", "stage1.safetensors", "model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_the_demo_submitted_to_a_head_and_two_worker_nodes_ends_as_on_one_machine(tmp_path, tiny_shards):
    if reason := why_unavailable():
        pytest.skip(reason)
    shorter = ["stage1.epochs=2", "stage2.epochs=2", "stage2.identities=4", "cluster.cpus_per_worker=1"]
    train = ["launch/train.py", "--config", "configs/demo.yaml", *shorter]
    with network(3, tmp_path, [tiny_shards]) as machines:
        nodes = Nodes(machines, tmp_path, dashboard=True)
        workers = [nodes.join().name for _ in range(2)]
        submit = ["ray", "job", "submit", "--address=http://127.0.0.1:8265", "--working-dir=.", "--", sys.executable]
        nodes.run(sys.executable, "cluster/deploy/wait_for_nodes.py", f"{nodes.head.ip}:6379", "3")
        places = [f"data.shards={tiny_shards}", f"run.dir={tmp_path / 'two'}", "cluster.placement=STRICT_SPREAD"]
        done = nodes.head.run([*submit, *train, *places], env=nodes.environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "status.json").read_text())["nodes"] == dict.fromkeys(workers, 1)
    runs.train("configs/demo.yaml", *shorter, f"data.shards={tiny_shards}", f"run.dir={tmp_path / 'one'}")
    assert_same_files(tmp_path / "one", tmp_path / "two")


def wait_until_empty(nodes) -> None:
    deadline = time.monotonic() + 30
    while left := [pid for node in nodes for pid in node.pids()]:
        assert time.monotonic() < deadline, subprocess.run(["ps", "-fp", ",".join(map(str, left))], capture_output=True)
        time.sleep(0.2)


def test_ray_up_brings_token_and_environment_to_both_nodes_and_joins_them(tmp_path):
    if reason := why_unavailable():
        pytest.skip(reason)
    with network(3, tmp_path) as (laptop, *nodes):
        clean = ["env", "-i", "HOME=/tmp/home", "PATH=/usr/bin:/bin:/usr/sbin:/sbin"]
        commands = fake_ssh(
            tmp_path / "ssh", {node.ip: f'exec {shlex.join(node.command(clean, cwd="/"))} "$@"' for node in nodes}
        )
        for node in nodes:  # `make setup` is not run: the environment is there.
            home = node.folder / "tmp" / "home"
            (home / "clipreid").mkdir(parents=True)
            (home / "clipreid" / ".venv").symlink_to(sys.prefix)
            (home / ".bashrc").touch()
            (home / ".bash_profile").write_text(f"export PATH={commands}:$PATH\n")
        own = tmp_path / "own"
        for name, text in ((".ray/auth_token", "c" * 64), (".ssh/id_ed25519", "key")):
            (own / name).parent.mkdir(parents=True)
            (own / name).write_text(text)

        config = yaml.safe_load((DEPLOY / "ray-up-onprem.yaml").read_text())
        config["provider"] |= {"head_ip": nodes[0].ip, "worker_ips": [nodes[1].ip]}
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            assert config[key].pop(0).endswith("ray stop")  # It would stop every Ray on this machine.
        (tmp_path / "up.yaml").write_text(yaml.safe_dump(config))
        ours = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        path = f"{commands}:{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
        up = ["ray", "up", "--yes", "--no-config-cache", str(tmp_path / "up.yaml")]
        done = laptop.run(up, env=ours | {"HOME": str(own), "PATH": path})
        assert done.returncode == 0, done.stdout + done.stderr

        head = ours | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/tmp/home/.ray/auth_token", "PATH": path}
        joined = nodes[0].run(["python", "cluster/deploy/wait_for_nodes.py", f"{nodes[0].ip}:6379", "2"], env=head)
        assert joined.stdout.endswith("2 of 2 nodes: node2, node3\n"), joined.stdout + joined.stderr
        for node in nodes:
            token = node.folder / "tmp" / "home" / ".ray" / "auth_token"
            assert token.read_text() == "c" * 64 and stat.S_IMODE(token.stat().st_mode) == 0o600
        calls = (tmp_path / "ssh" / "calls").read_text().splitlines()
        assert calls == [f"{node.name}: make -C /tmp/home/clipreid setup" for node in nodes]
