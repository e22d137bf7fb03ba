"""The processes that apply weights or judge features: those that torchrun started, or this one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cluster.launchers.ray import quiet_libraries, threads_per_worker
from cluster.ranks.team import Team, choose_device, join_process_group, leave_process_group
from cluster.settings.config import ClusterSection


@contextmanager
def this_team(settings: ClusterSection | None = None) -> Iterator[Team]:
    """The processes that torchrun started, of which this is one; without torchrun this one alone.

    Features and metrics are the same bit by bit for any number of them, and of threads on a CPU.
    """
    settings = settings or ClusterSection()
    launched = "WORLD_SIZE" in os.environ
    quiet_libraries()
    team = join_process_group(settings.timeout_s) if launched else Team(device=choose_device(0))
    if team.device.type == "cpu" and (launched or settings.cpus_per_worker):
        torch.set_num_threads(threads_per_worker(settings, int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    try:
        yield team
    finally:
        if launched:
            leave_process_group(team)
