"""One process as a rank: it joins the group that its environment describes, takes a device and threads, and leaves.

    environment of torchrun or Ray Train ──▶ [process] ──▶ Team ──▶ training, evaluation, extraction

The same for training under each launcher, for evaluation and for extraction.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from cluster.ranks.arithmetic import full_float32
from cluster.ranks.team import PATIENCE, Team
from cluster.ranks.watchdog import Watchdog
from cluster.settings.config import ClusterSection
from shards.errors import mask_logs

QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # Otherwise everything is printed twice.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # Otherwise relative paths change their meaning in the workers.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # A worker behind a network partition never answers.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # ray_policies has one that prints nothing.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""Environment variables of every process of a run, as far as the user has not set them."""
LOOPBACK_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""The same where all of them are on one machine: what they say to each other is heard by nobody else."""


def quiet_libraries() -> None:
    """Libraries print at import and at start; a user wants to read about the run. And nothing logs a password."""
    mask_logs()
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)  # Torch to DeepSpeed's authors, about names to come.
    # None is all others: Ray reports by a logger that it named after a file.
    for logger in ("ray.train", "ray.tune", "torch.distributed", None):
        logging.getLogger(logger).setLevel(logging.WARNING)


@contextmanager
def joined(timeout_s: float, cpus: int) -> Iterator[Team]:
    """This process as a rank of its group, with `cpus` threads where it has no GPU. A group that Ray Train made stays
    when the block ends, any other is left. DeepSpeed is to be imported inside of the block: it prints as it loads."""
    quiet_libraries()
    adopted = dist.is_initialized()
    team = join_process_group(timeout_s, cpus)
    if team.device.type == "cpu":
        torch.set_num_threads(cpus)
    try:
        yield team
    finally:
        if not adopted:
            leave_process_group(team)


@contextmanager
def this_team(settings: ClusterSection | None = None) -> Iterator[Team]:
    """The processes that torchrun started, of which this is one; without torchrun this one alone.

    Features and metrics are the same bit by bit for any number of them, and of threads on a CPU.
    """
    settings = settings or ClusterSection()
    if "WORLD_SIZE" in os.environ:
        with joined(settings.timeout_s, threads_per_worker(settings)) as team:
            yield team
        return
    quiet_libraries()
    team = Team(device=choose_device(0))
    if team.device.type == "cpu" and settings.cpus_per_worker:
        torch.set_num_threads(settings.cpus_per_worker)
    yield team


def threads_per_worker(settings: ClusterSection) -> int:
    """Torch's threads on a CPU, an equal share among the processes that torchrun started on this node.

    Sums round differently with another number of threads, so where a run may move between machines of different sizes,
    cluster.cpus_per_worker keeps its results the same bit by bit.
    """
    workers_on_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return settings.cpus_per_worker or max(1, len(os.sched_getaffinity(0)) // workers_on_node)


def join_process_group(timeout_s: float, cpus: int | None = None) -> Team:
    """Make the process group that torchrun's environment describes, or one of a single process.

    Under Ray Train the group exists already and is adopted; one of gloo says that workers have no GPU, though a node's
    may be in sight.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    without_gpu = dist.is_initialized() and dist.get_backend() == "gloo"
    device = torch.device("cpu") if without_gpu else choose_device(local_rank)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
            if os.environ["WORLD_SIZE"] == os.environ.get("LOCAL_WORLD_SIZE"):
                for name, value in LOOPBACK_ENVIRONMENT.items():
                    os.environ.setdefault(name, value)
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return Team(rank, world_size, local_rank, device, cpus)
    watchdog = Watchdog(rank, world_size, timeout_s)
    patient = dist.new_group(timeout=timedelta(seconds=PATIENCE * timeout_s))
    return Team(rank, world_size, local_rank, device, cpus, watchdog, patient)


def leave_process_group(team: Team) -> None:
    """At the end of the process. A thread of the watchdog that is in the store while Python ends would abort it."""
    if team.watchdog is not None:
        team.watchdog.close()
    dist.destroy_process_group()


def choose_device(local_rank: int) -> torch.device:
    """This worker's GPU where there is one, else the CPU. Ray hides the other workers' GPUs, torchrun does not."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    full_float32()
    return device
