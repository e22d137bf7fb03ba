"""The team of workers: gathers with gradients, shared features, and hangs that become named failures."""

import logging
import pickle
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from cluster.errors import RankLost
from cluster.evaluation.features import PassSettings, extract
from cluster.ranks import watchdog
from cluster.ranks.process import join_process_group, leave_process_group
from cluster.ranks.team import Team
from cluster.ranks.watchdog import Watchdog
from shards.loading.index import ShardIndex
from tests.helpers.processes import on_processes

TIMEOUT_S = 4.0


def gather_and_share(team, shards):
    """Everything that needs a pair of processes, in one go, and without a warning of torch's."""
    warnings.simplefilter("error")
    own = torch.full((2, 3), float(team.rank + 1), requires_grad=True)
    gathered = team.all_gather(own)
    (gathered * torch.arange(4.0)[:, None] * (team.rank + 1)).sum().backward()
    index = ShardIndex.open(str(shards))
    rows = extract(lambda images, rows: rows[:, None] * torch.ones(3), index, "train", team, PassSettings((8, 8), 5))
    return gathered.detach(), own.grad, np.array(rows), team.all_gather_objects(team.rank * 10, "numbers")


def test_gather_is_in_rank_order_and_its_gradient_sums_over_ranks(tiny_shards):
    first, second = on_processes(2, gather_and_share, tiny_shards)
    assert first[0][:, 0].tolist() == second[0][:, 0].tolist() == [1, 1, 2, 2]
    assert first[1][:, 0].tolist() == [0, 1 + 2]
    assert second[1][:, 0].tolist() == [2 + 4, 3 + 6]
    assert first[3] == second[3] == [0, 10]
    for rank in (first, second):
        assert (rank[2][:, 0] == np.arange(len(rank[2]))).all()


def patient_collectives(team):
    peers = team.patiently("merge")
    own = torch.full((2,), float(team.rank + 1), requires_grad=True)
    gathered = peers.all_gather(own)
    (gathered * torch.arange(4.0)).sum().backward()
    return peers.rank, peers.world_size, gathered.tolist(), own.grad.tolist(), peers.all_reduce_sum(own).tolist()


def test_a_patient_team_gathers_and_sums_as_the_team_does():
    assert on_processes(2, patient_collectives) == [
        (0, 2, [1, 1, 2, 2], [0, 2], [3, 3]),
        (1, 2, [1, 1, 2, 2], [4, 6], [3, 3]),
    ]


def leave(team):
    """Threads of the watchdog that are left when the process group is."""
    team.watchdog = Watchdog(team.rank, team.world_size, TIMEOUT_S)
    began = [thread.is_alive() for thread in team.watchdog.threads]
    team.barrier("arrive together")
    leave_process_group(team)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # For the helper to end.
    return began, [thread.is_alive() for thread in team.watchdog.threads]


def test_no_thread_is_in_the_store_when_a_worker_has_left():
    assert on_processes(2, leave) == [([True, True], [False, False])] * 2


def arrive_late(team):
    """Rank 1 is busy for longer than a collective may take; what rank 0 makes of it."""
    team.watchdog = Watchdog(team.rank, team.world_size, TIMEOUT_S)
    team.patient_group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    team.all_gather_objects(None, "arrive together")
    if team.rank == 1:
        time.sleep(2 * TIMEOUT_S)
        return None
    try:
        team.all_gather_objects(None, "average losses")
    except RankLost as error:
        return pickle.loads(pickle.dumps(error))


def test_a_rank_that_does_not_arrive_is_named_with_the_operation():
    lost, _ = on_processes(2, arrive_late)
    assert lost.operation == "average losses" and set(lost.missing) == {1}
    assert "rank 1: still in 'own work after arrive together'" in str(lost)
    assert TIMEOUT_S - 1 < lost.waited_s < TIMEOUT_S + 10


def stay_away(team, folder):
    """Rank 1 does not come, under a timeout of gloo that would not end the test."""
    logging.basicConfig(filename=f"{folder}/{team.rank}.log")
    watchdog.GRACE_S = 0.5
    team.watchdog = Watchdog(team.rank, team.world_size, timeout_s=3)  # By then rank 1's heartbeat names its operation.
    team.all_gather_objects(None, "arrive together")
    if team.rank == 1:
        time.sleep(60)
    with team.within("average losses"):
        team.all_reduce_sum(torch.ones(1))


def test_a_collective_that_never_ends_is_ended_with_the_names_of_rank_and_operation(tmp_path):
    with pytest.raises(ProcessExitedException) as caught:
        on_processes(2, stay_away, tmp_path)
    assert (caught.value.error_index, caught.value.exit_code) == (0, watchdog.EXIT_CODE)
    text = (tmp_path / "0.log").read_text()
    assert "in 'average losses'; did not arrive: rank 1: still in 'own work after arrive together'" in text


def fail_on_first(team):
    try:
        team.on_first(lambda: Path("/nowhere/file").read_bytes(), "read")
    except OSError as error:
        return str(error)


def test_what_fails_on_rank_0_alone_is_raised_on_every_rank():
    assert set(on_processes(2, fail_on_first)) == {"[Errno 2] No such file or directory: '/nowhere/file'"}


def test_one_process_needs_no_group():
    team = Team()
    tensor = torch.ones(2)
    assert (
        team.all_gather(tensor) is tensor
        and team.all_gather_objects(3, "x") == [3]
        and team.all_reduce_sum(tensor).tolist() == [1, 1]
        and team.patiently("x").all_reduce_sum(tensor).tolist() == [1, 1]
    )


def join_where_a_gpu_is_in_sight(team):
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
    return join_process_group(TIMEOUT_S).device.type


def test_workers_that_were_given_no_gpu_use_none():
    assert on_processes(1, join_where_a_gpu_is_in_sight) == ["cpu"]
