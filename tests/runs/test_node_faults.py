"""The fault matrix's rows about nodes: each is a network namespace with a Ray node in it, the head and the driver are
on one without workers. Skipped where the user may not make namespaces."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.faults import Torchrun, assert_same_result, seeded
from tests.helpers.namespaces import network, why_unavailable
from tests.helpers.ray_nodes import Nodes
from tests.helpers.runs import BIN, read_log
from tests.runs.test_runs import assert_same_losses

pytestmark = pytest.mark.faults


def workers_on(node):
    """Ids of the Ray Train workers on a node."""
    found = []
    for pid in node.pids():
        try:
            if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def undisturbed(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Torchrun(2, folder, tiny_shards)
    run.end()
    return run.run_dir


@pytest.fixture
def nodes(tiny_shards, tmp_path):
    """A head and three nodes that have not joined."""
    if reason := why_unavailable():
        pytest.skip(reason)
    with network(4, tmp_path, [tiny_shards]) as machines:
        yield Nodes(machines, tmp_path)


def test_a_node_crashes_and_a_replacement_joins(nodes, tiny_shards, tmp_path, undisturbed):
    dice = seeded("node")
    victims = [nodes.join(), nodes.join()]
    job = nodes.job(tmp_path, tiny_shards, cluster__placement="STRICT_SPREAD")
    job.wait_for_step(2, dice.randint(1, 20))
    dice.choice(victims).crash()
    killed = time.monotonic()
    nodes.join()
    job.wait_for_restart()
    print(f"crash to training again: {time.monotonic() - killed:.1f} s")
    job.end()
    assert_same_result(undisturbed, job.run_dir)


def test_an_elastic_run_shrinks_with_the_cluster_and_grows_again(nodes, tiny_shards, tmp_path):
    longer = {"stage2__epochs": 30, "cluster__workers": "{min: 1, max: 2}"}
    dice = seeded("elastic")
    lost, kept = dice.sample([nodes.join(), nodes.join()], 2)
    job = nodes.job(tmp_path, tiny_shards, **longer)
    job.wait_for_step(2, dice.randint(2, 20))
    lost.crash()
    crashed = time.monotonic()
    job.wait_until(lambda: job.status().get("workers") == 1 and job.status()["phase"] == "stage 2")
    print(f"crash to training with one worker: {time.monotonic() - crashed:.1f} s")
    late = nodes.join()
    joined = time.monotonic()
    job.wait_until(lambda: crawl(workers_on(kept)) or workers_on(late))
    job.wait_for_restart(2)
    print(f"join to training with two workers: {time.monotonic() - joined:.1f} s")
    job.end()
    assert job.status()["workers"] == 2
    (tmp_path / "reference").mkdir()
    reference = Torchrun(2, tmp_path / "reference", tiny_shards, stage2__epochs=30)
    reference.end()
    # 120 steps: by then rounding has grown to 1e-5 or, on some processors, 1e-4 (test_agreement.py).
    assert_same_losses(read_log(reference.run_dir), read_log(job.run_dir), tolerance=1e-3)


def crawl(workers):
    """Hold the workers up for a while, so that a short run lasts as long as the test needs."""
    for sent, pause_s in ((signal.SIGSTOP, 1.5), (signal.SIGCONT, 0.03)):
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        time.sleep(pause_s)


def test_a_silent_link_is_noticed_in_time_and_the_run_goes_on_elsewhere(nodes, tiny_shards, tmp_path, undisturbed):
    dice = seeded("link")
    cut, other = dice.sample([nodes.join(), nodes.join()], 2)
    job = nodes.job(tmp_path, tiny_shards, cluster__placement="STRICT_SPREAD", cluster__timeout_s=20)
    job.wait_for_step(2, dice.randint(1, 20))
    assert workers_on(other)
    cut.cut_link()
    silent = time.monotonic()
    job.wait_until(lambda: "did not arrive: rank" in job.text(), timeout_s=20 + 30)
    print(f"noticed after {time.monotonic() - silent:.1f} s")
    nodes.join()
    job.wait_for_restart()
    print(f"training again after {time.monotonic() - silent:.1f} s")
    job.end()
    assert_same_result(undisturbed, job.run_dir)


def test_a_drain_notice_saves_the_step_and_moves_the_workers(nodes, tiny_shards, tmp_path, undisturbed):
    three = [nodes.join(), nodes.join(), nodes.join()]
    job = nodes.job(tmp_path, tiny_shards, cluster__placement="STRICT_SPREAD", checkpoint__every_steps=0)
    job.wait_for_step(1, 1)
    drained = next(node for node in three if workers_on(node))
    (pid,) = workers_on(drained)
    notice = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", "--deadline-remaining-seconds=120"]
    drained.run([str(BIN / "ray"), "drain-node", f"--address={nodes.head.ip}:6379", *notice], env=nodes.environment)
    job.wait_until(lambda: crawl(workers_on(drained)) or pid not in workers_on(drained))
    before = job.last_step()
    job.wait_for_restart()
    assert job.status()["resumed_from"].endswith(f"step {before[1]}")
    assert not workers_on(drained)
    job.end()
    assert_same_result(undisturbed, job.run_dir)
