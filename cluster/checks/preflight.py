"""A few seconds before training that save hours: what every worker is, has, and can see.

    workers placed ──▶ [preflight] ──▶ one table, or one error that names node and remedy ──▶ worker.train

Every rank takes part, and every rank raises what one of them found.
"""

import hashlib
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from cluster.errors import TrainingError
from cluster.ranks.team import Team
from cluster.run.storage import Storage
from cluster.settings.config import Config
from cluster.settings.yaml_file import dump_config
from shards.errors import DataError
from shards.loading.cache import CacheSettings
from shards.loading.index import ShardIndex
from shards.loading.reader import RowReader, shard_cache

PROBE_BYTES = 8_000_000
MARKERS = "preflight"


@dataclass
class WorkerFacts:
    """One worker's machine, and what it found."""

    rank: int
    host: str
    device: str
    versions: str
    imports_gb: float
    """Memory of its process before there is a model: what it has imported."""
    memory_gb: float
    """Free main memory."""
    disk_gb: float
    """Free where data.cache_dir is."""
    threads: int
    config: str
    """Hash of its settings."""
    dataset: str = ""
    """Fingerprint of the shards that it sees."""
    bandwidth_gb_s: float = 0.0
    faults: list[str] = field(default_factory=list)
    """A line for each thing that would stop the run later."""
    warnings: list[str] = field(default_factory=list)
    """A line for each thing that may."""


def preflight(config: Config, team: Team) -> str:
    """Check every worker's machine, storage and data against each other. Returns the table of all workers, as text.

    Raises TrainingError on every rank, with one line per fault that names rank, host and remedy.
    """
    facts = _facts(config, team)
    mark = team.broadcast_object(os.urandom(8).hex(), "preflight: mark").encode()
    _write_marker(config, team, facts, mark)
    team.barrier("preflight: markers")
    _read_markers(config, team, facts, mark)
    _read_data(config, facts)
    facts.bandwidth_gb_s = _all_reduce_bandwidth(team)
    everyone = team.all_gather_objects(facts, "preflight: facts")
    if team.is_first:
        Storage(config.run.dir).remove(MARKERS)
    faults = [f"rank {w.rank} on {w.host}: {fault}" for w in everyone for fault in w.faults]
    faults += _differences(everyone)
    warnings = [f"rank {w.rank} on {w.host}: {warning}" for w in everyone for warning in w.warnings]
    low, high = config.cluster.worker_range
    # An elastic run goes on with the nodes that are left to it.
    (faults if low == high else warnings).extend(_scattered_virtual_nodes(config, [w.host for w in everyone]))
    if faults:
        raise TrainingError("\n".join(faults))
    return _table(everyone) + "".join(f"warning: {line}\n" for line in warnings)


def _facts(config: Config, team: Team) -> WorkerFacts:
    disk_gb, faults = _free_in_cache(config)
    gpu = team.device.type == "cuda"
    return WorkerFacts(
        rank=team.rank,
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(team.device) if gpu else "cpu",
        versions=f"python {platform.python_version()}, torch {torch.__version__}, "
        + ", ".join(f"{package} {version(package)}" for package in ("deepspeed", "ray")),
        imports_gb=round(psutil.Process().memory_info().rss / 1e9, 2),
        memory_gb=round(psutil.virtual_memory().available / 1e9, 1),
        disk_gb=disk_gb,
        threads=torch.get_num_threads(),
        config=hashlib.sha256(dump_config(config).encode()).hexdigest()[:12],
        faults=faults,
    )


def _free_in_cache(config: Config) -> tuple[float, list[str]]:
    """GB, and what keeps this worker from writing features and remote shards there."""
    cache = config.data.cache_dir or tempfile.gettempdir()
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return round(shutil.disk_usage(cache).free / 1e9, 1), []
    except OSError as error:
        return 0.0, [f"data.cache_dir {cache} cannot be used ({error}): name a folder on the node that can be written"]


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
        cache = shard_cache(index, CacheSettings(config.data.cache_dir, int(config.data.cache_gb * 1e9)))
        (record,) = RowReader(train, cache, fetch=False).read([facts.rank % len(train)])
        if isinstance(record, DataError):
            raise record
        cached_gb = min(config.data.cache_gb, sum(map(index.shard_bytes, index.shard_names)) / 1e9) if cache else 0.0
        if facts.disk_gb < cached_gb:
            facts.warnings.append(
                f"{facts.disk_gb} GB are free for {cached_gb:.1f} GB of cached shards: make room, name another "
                "data.cache_dir, or lower data.cache_gb"
            )
    except Exception as error:
        facts.faults.append(f"data.shards: {error}")


def _all_reduce_bandwidth(team: Team) -> float:
    """GB/s of an 8 MB all-reduce, counted as bytes per second that each rank's result took."""
    if team.world_size == 1:
        return 0.0
    probe = torch.ones(PROBE_BYTES // 4, device=team.device)
    with team.within("preflight: all-reduce"):
        team.all_reduce_sum(probe)
        _synchronise(team)
        start = time.perf_counter()
        for _ in range(3):
            team.all_reduce_sum(probe)
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


def _scattered_virtual_nodes(config: Config, hosts: list[str]) -> Iterator[str]:
    """Why data.locality=node would not keep every node to shards of its own. `hosts`: every rank's node."""
    if config.data.locality != "node":
        return
    nodes, each = list(dict.fromkeys(hosts)), len(hosts) // len(set(hosts))
    if hosts != [node for node in nodes for _ in range(each)]:
        ranks = "; ".join(f"{node}: {[r for r, host in enumerate(hosts) if host == node]}" for node in nodes)
        yield (
            f"data.locality: node, but nodes do not hold equal numbers of neighbouring ranks ({ranks}): start as many "
            "workers on each, or set data.locality=none"
        )
    elif config.data.virtual_nodes % len(nodes):
        yield (
            f"data.virtual_nodes: {config.data.virtual_nodes} do not fall on {len(nodes)} nodes in equal parts: set a "
            "multiple, or data.locality=none"
        )


def _table(everyone: list[WorkerFacts]) -> str:
    table = Table("rank", "host", "device", "imports", "free memory", "free disk", "threads", "all-reduce", "dataset")
    for w in everyone:
        speed = f"{w.bandwidth_gb_s} GB/s" if w.bandwidth_gb_s else "-"
        sizes = (f"{w.imports_gb} GB", f"{w.memory_gb} GB", f"{w.disk_gb} GB", str(w.threads))
        table.add_row(str(w.rank), w.host, w.device, *sizes, speed, w.dataset[:12])
    text = StringIO()
    console = Console(width=110, file=text)
    console.print(f"all workers: {everyone[0].versions}", highlight=False)
    console.print(table)
    return text.getvalue()
