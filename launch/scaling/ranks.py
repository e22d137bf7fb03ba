"""One function on several processes of this machine, as the ranks of a team: what a cluster is without its network.

    benchmark ──▶ [ranks] ──▶ R processes, gloo (NCCL where there is a GPU for each) ──▶ their results

They are forked from a process that has the libraries loaded, which takes longer than most that they do.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.ranks.process import join_process_group, leave_process_group, quiet_libraries

TIMEOUT_S = 1800.0
LOADED = ["cluster.training.worker", "torch._dynamo", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]
"""Before the processes are forked. DeepSpeed loads the last one with every engine, and the compiler with it."""


def on_ranks(world_size: int, work: Callable[..., Any], *inputs: Any) -> list[Any]:
    """`work(team, *inputs)` on every rank, with one thread where it has no GPU; what each rank returned.

    work: a function of a module. The processes end with it, so each call begins with fresh memory.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Otherwise DeepSpeed warns that it looked for another one.
    multiprocessing.set_forkserver_preload(LOADED)
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as folder:
        mp.start_processes(_enter, (world_size, work, inputs, folder), nprocs=world_size, start_method="forkserver")
        results = [Path(folder) / f"{rank}.pt" for rank in range(world_size)]
        return [torch.load(path, weights_only=False) for path in results]


def _enter(rank: int, world_size: int, work: Callable[..., Any], inputs: tuple[Any, ...], folder: str) -> None:
    quiet_libraries()
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    backend = "nccl" if torch.cuda.device_count() >= world_size else "gloo"
    dist.init_process_group(
        backend,
        f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    team = join_process_group(TIMEOUT_S)
    torch.save(work(team, *inputs), Path(folder) / f"{rank}.pt")
    leave_process_group(team)
