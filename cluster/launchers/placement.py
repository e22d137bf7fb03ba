"""What a worker gets of a node, and how many workers the nodes have room for.

    Ray's nodes, Config ──▶ [placement] ──▶ ray (CPUs and GPU of each worker), workers (threads, loaders)

Plain arithmetic, no Ray.
"""

from cluster.settings.config import Config

Resources = dict[str, float]
"""Amounts by Ray's names: "CPU", "GPU", …"""


def room_for(nodes: list[Resources], need: Resources, placement: str) -> int:
    """How many workers that each need so much fit on the nodes."""
    counts = [int(min(node.get(name, 0) // amount for name, amount in need.items())) for node in nodes]
    if placement == "STRICT_SPREAD":
        counts = [min(on_node, 1) for on_node in counts]
    return max(counts, default=0) if placement == "STRICT_PACK" else sum(counts)


def worker_needs(config: Config, nodes: list[Resources], use_gpu: bool) -> Resources:
    """One GPU where there are any, with a CPU for the worker and one for each loader; without GPUs an equal share of
    the CPUs. No more CPUs than leave room for all workers, or for the fewest where the nodes have none for all."""
    gpu = {"GPU": 1.0} if use_gpu else {}
    if config.cluster.cpus_per_worker:
        return {"CPU": float(config.cluster.cpus_per_worker)} | gpu
    sizes = config.allowed_workers()
    wanted = 1 + config.data.loaders if use_gpu else int(max((node.get("CPU", 0) for node in nodes), default=1))
    for workers in (sizes[-1], sizes[0]):
        for cpus in range(wanted, 0, -1):
            if room_for(nodes, gpu | {"CPU": cpus}, config.cluster.placement) >= workers:
                return {"CPU": float(cpus)} | gpu
    return {"CPU": 1.0 + config.data.loaders if use_gpu else 1.0} | gpu  # Nodes are still to come.


def shortage(config: Config, nodes: list[Resources], need: Resources) -> str | None:
    """A line for the user where the nodes have no room for the fewest workers that the run can begin with."""
    low, placement = min(config.allowed_workers()), config.cluster.placement
    room = room_for(nodes, need, placement)
    if room >= low:
        return None
    each = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
    there = "; ".join(" and ".join(f"{node.get(name, 0):g} {name}" for name in need) for node in nodes)
    return (
        f"cluster.workers: {low} workers with {each} each, placed {placement}, do not fit on the cluster's nodes "
        f"({there}: room for {room}); waiting for more; to ask for less, stop and change cluster.workers, "
        "cluster.cpus_per_worker, cluster.gpus_per_worker or cluster.placement"
    )
