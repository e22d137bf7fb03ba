"""Run one function on several gloo processes, the cheapest stand-in for a team of workers.

They are forked from a process that has the libraries loaded: loading them takes longer than most tests.
"""

import multiprocessing
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.ranks.team import Team


def on_processes(world_size, function, *inputs, timeout_s=60):
    """`function(team, *inputs)` on every rank; the list of what the ranks returned."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(
            ["tests.helpers.processes", "cluster.training.worker", "deepspeed", "torch._dynamo"]
        )
        mp.start_processes(
            _enter, (world_size, function, inputs, folder, timeout_s), nprocs=world_size, start_method="forkserver"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _enter(rank, world_size, function, inputs, folder, timeout_s):
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    result = function(Team(rank, world_size, rank), *inputs)
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
