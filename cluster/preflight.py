"""A few seconds before training that save hours: what every worker is, has, and can see.

workers placed ──▶ [preflight] ──▶ one table, or one error that names node and remedy ──▶ worker.train
"""

import hashlib
import os
import platform
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cluster.config import Config, dump_config
from cluster.errors import TrainingError
from cluster.storage import Storage
from cluster.team import Team
from shards.errors import DataError
from shards.index import ShardIndex
from shards.reader import RowReader, shard_cache

PROBE_BYTES = 8_000_000
MARKERS = "preflight"


@dataclass
class WorkerFacts:
    """What one worker says of itself. `faults` has a line for each thing that would stop the run later."""

    rank: int
    host: str
    device: str
    versions: str
    memory_gb: float
    disk_gb: float
    threads: int
    config: str
    dataset: str = ""
    bandwidth_gb_s: float = 0.0
    faults: list[str] = field(default_factory=list)


def preflight(config: Config, team: Team) -> str:
    """Check every worker's machine, storage and data against each other. Returns the table of all workers, as text.

    Raises:
        TrainingError: on every rank, one line per fault, each naming rank, host and remedy.
    """
    facts = _facts(config, team)
    mark = team.from_first(os.urandom(8).hex(), "preflight: mark").encode()
    _write_marker(config, team, facts, mark)
    team.wait("preflight: markers")
    _read_markers(config, team, facts, mark)
    _read_data(config, facts)
    facts.bandwidth_gb_s = _all_reduce_bandwidth(team)
    everyone = team.collect(facts, "preflight: facts")
    if team.is_first:
        Storage(config.run.dir).remove(MARKERS)
    faults = [f"rank {w.rank} on {w.host}: {fault}" for w in everyone for fault in w.faults]
    faults += _differences(everyone)
    if faults:
        raise TrainingError("\n".join(faults))
    return _table(everyone)


def _facts(config: Config, team: Team) -> WorkerFacts:
    cache = config.data.cache_dir or tempfile.gettempdir()
    Path(cache).mkdir(parents=True, exist_ok=True)
    gpu = team.device.type == "cuda"
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return WorkerFacts(
        rank=team.rank,
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(team.device) if gpu else "cpu",
        versions=f"python {platform.python_version()}, torch {torch.__version__}, "
        + ", ".join(f"{package} {version(package)}" for package in ("deepspeed", "ray")),
        memory_gb=round(pages / 1e9, 1),
        disk_gb=round(shutil.disk_usage(cache).free / 1e9, 1),
        threads=torch.get_num_threads(),
        config=hashlib.sha256(dump_config(config).encode()).hexdigest()[:12],
    )


def _write_marker(config: Config, team: Team, facts: WorkerFacts, mark: bytes) -> None:
    try:
        Storage(config.run.dir).write(f"{MARKERS}/{team.rank}", mark)
    except Exception as error:  # Each kind of storage has errors of its own.
        facts.faults.append(f"run.dir {config.run.dir} cannot be written ({error}): mount it, or use a shared URL")


def _read_markers(config: Config, team: Team, facts: WorkerFacts, mark: bytes) -> None:
    """`mark` is this start's: markers of an earlier one may lie on a disk that is not shared."""
    unseen = [str(rank) for rank in range(team.world_size) if not _has_mark(config, rank, mark)]
    if unseen:
        facts.faults.append(
            f"run.dir {config.run.dir} does not show what rank {', '.join(unseen)} wrote: it is not the same storage "
            "on all nodes; use a shared mount or a URL"
        )


def _has_mark(config: Config, rank: int, mark: bytes) -> bool:
    try:
        return Storage(config.run.dir).read(f"{MARKERS}/{rank}") == mark
    except Exception:
        return False


def _read_data(config: Config, facts: WorkerFacts) -> None:
    try:
        index = ShardIndex.open(config.data.shards, config.data.cache_dir)
        facts.dataset = index.fingerprint
        train = index.split("train")
        cache = shard_cache(index, config.data.cache_dir, int(config.data.cache_gb * 1e9))
        (record,) = RowReader(train, cache, fetch=False).read([facts.rank % len(train)])
        if isinstance(record, DataError):
            raise record
    except Exception as error:
        facts.faults.append(f"data.shards: {error}")


def _all_reduce_bandwidth(team: Team) -> float:
    """GB/s of an 8 MB all-reduce, counted as bytes per second that each rank's result took."""
    if team.world_size == 1:
        return 0.0
    probe = torch.ones(PROBE_BYTES // 4, device=team.device)
    with team.joining("preflight: all-reduce"):
        team.sum(probe)
        _synchronise(team)
        start = time.perf_counter()
        for _ in range(3):
            team.sum(probe)
        _synchronise(team)
    return round(3 * PROBE_BYTES / (time.perf_counter() - start) / 1e9, 2)


def _synchronise(team: Team) -> None:
    if team.device.type == "cuda":
        torch.cuda.synchronize(team.device)


def _differences(everyone: list[WorkerFacts]) -> list[str]:
    """Workers that do not have rank 0's configuration, dataset or versions."""
    first, faults = everyone[0], []
    for worker in everyone[1:]:
        for name, remedy in (
            ("config", "start all workers with the same files"),
            ("dataset", "copy the same shards to every node, or use a shared URL"),
            ("versions", "install the lock file's versions on every node"),
        ):
            mine, theirs = getattr(worker, name), getattr(first, name)
            if mine and theirs and mine != theirs:
                faults.append(f"rank {worker.rank} on {worker.host}: {name} {mine}, rank 0 has {theirs}: {remedy}")
    return faults


def _table(everyone: list[WorkerFacts]) -> str:
    table = Table("rank", "host", "device", "free memory", "free disk", "threads", "all-reduce", "dataset")
    for w in everyone:
        speed = f"{w.bandwidth_gb_s} GB/s" if w.bandwidth_gb_s else "-"
        sizes = (f"{w.memory_gb} GB", f"{w.disk_gb} GB", str(w.threads))
        table.add_row(str(w.rank), w.host, w.device, *sizes, speed, w.dataset[:12])
    console = Console(width=110, file=StringIO())
    console.print(f"all workers: {everyone[0].versions}", highlight=False)
    console.print(table)
    return console.file.getvalue()
