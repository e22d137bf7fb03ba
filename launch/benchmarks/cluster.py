"""Step time and efficiency at 1 to 512 GPUs, predicted from one worker's step and a network's bandwidth and latency.

Measured here: steps of one worker. Counted: the FLOPs of a step, and the bytes that a rank sends in one. The rest is
arithmetic (`launch/scaling/prediction.py`), whose assumptions the result states; it is checked against measured steps
of 1, 2 and 4 processes of this machine, with the bandwidth and latency of its loopback as the network. Fixed scaling
divides one global batch among the GPUs, weak scaling gives each GPU a batch of its own.
"""

import argparse
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cluster.ranks.team import Team
from launch.benchmarks.scale import add_model_options, read_image_size
from launch.cli import Parser, local_place, positive
from launch.measure.timing import machine_facts
from launch.scaling.charts import cluster_chart, table, write
from launch.scaling.prediction import ASSUMPTIONS, Counted, Network, Payload, Worker, predicted
from launch.scaling.ranks import on_ranks
from launch.scaling.stages import PER_IDENTITY, Case, flops, measure
from launch.scaling.traffic import rules

EXAMPLE = """examples:
  python launch/bench.py cluster --out cluster
  python launch/bench.py cluster --gbit-per-s 100 --latency-us 10 --arch ViT-B-16-quickgelu --image-size 256x128 \\
      --tflops 200 --memory-gb-s 2000"""
CHECKED_RANKS = (1, 2, 4)
FEWEST_FACTOR = 4
"""The smaller of the two local batches that a worker's step is fitted to, is this part of --batch."""
ADAM_PASSES = 7
"""Over a table: value and moments read and written, the gradient read."""
LARGE_ELEMENTS, SMALL_ELEMENTS = 1 << 22, 16
COLUMNS = {
    "stage": lambda row: row["stage"],
    "GPUs": lambda row: row["gpus"],
    "global batch": lambda row: f"{row['global_batch']:,}",
    "computing, ms": lambda row: row["computing_ms"],
    "network, ms": lambda row: row["network_ms"],
    "sent per GPU, MB": lambda row: round(row["sent_bytes"] / 1e6, 2),
    "efficiency": lambda row: f"{row['efficiency']:.2f} to {row['efficiency_overlapped']:.2f}",
}


def run(arguments: list[str]) -> dict[str, Any]:
    options = _options(arguments)
    network = Network(options.gbit_per_s, options.latency_us * 1e-6)
    rows: dict[str, list[dict[str, Any]]] = {"fixed": [], "weak": []}
    checks, measured = [], []
    for stage in options.stages:
        known = _known(Case(stage, options.identities, options.batch, options.arch, options.image_size), options.steps)
        checks += known.checks
        worker = known.worker
        if options.tflops:
            worker = known.counted.on_gpu(options.tflops, options.memory_gb_s)
        counted = {"counted": asdict(known.counted), "payload_bytes": asdict(known.payload)}
        measured.append({"stage": stage, "worker": asdict(worker), **counted})
        for name, images, weak in (("fixed", options.fixed_batch, False), ("weak", options.batch, True)):
            rows[name] += predicted(
                stage, worker, known.payload, network, images=images, weak=weak, most_ranks=options.gpus
            )
    result = {
        "bench": "cluster",
        **machine_facts(torch.device("cpu")),
        "threads": 1,
        "cores": _cores(),
        "load_average": round(os.getloadavg()[0], 1),
        "given": {key: value for key, value in vars(options).items() if key != "out"},
        "assumptions": [*ASSUMPTIONS, *(f"{kind} sends {rule}" for kind, rule in rules().items())],
        "measured_and_counted": measured,
        "check": checks,
        "predicted": rows,
    }
    if options.out:
        write(options.out, "cluster", result, _tables(rows), cluster_chart(rows))
    return result


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py cluster", description=__doc__, epilog=EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--identities", type=positive, default=13_164, metavar="N", help="(default VehicleID's 13,164)")
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--fixed-batch", type=positive, default=2048, help="global batch of fixed scaling (2048)")
    parser.add_argument("--gpus", type=positive, default=512, help="most of them (default 512)")
    parser.add_argument("--gbit-per-s", type=float, default=100.0, help="bandwidth of a GPU's link (default 100)")
    parser.add_argument("--latency-us", type=float, default=10.0, help="of one message (default 10)")
    parser.add_argument("--tflops", type=float, help="what a GPU sustains, in place of the step measured here")
    parser.add_argument("--memory-gb-s", type=float, default=2000.0, help="of such a GPU (default 2000)")
    parser.add_argument("--out", type=local_place, metavar="FOLDER", help="also write cluster.json, .md and .png there")
    options = parser.parse_args(arguments)
    read_image_size(options, parser)
    unit = PER_IDENTITY * max(CHECKED_RANKS)
    if options.batch % unit or options.batch < 2 * unit:
        parser.error(f"--batch {options.batch} is not a multiple of {unit}, at least {2 * unit}")
    if options.fixed_batch < PER_IDENTITY * options.gpus:
        parser.error(
            f"--fixed-batch {options.fixed_batch} has fewer than {PER_IDENTITY} images for {options.gpus} GPUs"
        )
    if options.identities < 2 * options.batch:
        parser.error(f"--identities {options.identities} are fewer than twice the batch")
    if min(options.gbit_per_s, options.latency_us, options.memory_gb_s, options.tflops or 1) <= 0:
        parser.error("--gbit-per-s, --latency-us, --tflops and --memory-gb-s have to be above 0")
    Case(1, options.identities, options.batch, options.arch, options.image_size).spec()
    return options


@dataclass(frozen=True)
class Known:
    """What is measured and counted of a stage here."""

    worker: Worker
    counted: Counted
    payload: Payload
    checks: list[dict[str, Any]]


def _known(case: Case, num_steps: int) -> Known:
    few = replace(case, identities=2 * case.batch)
    small = replace(few, batch=case.batch // FEWEST_FACTOR)
    double = replace(few, batch=2 * few.batch)
    cases = {1: (small, few, double, case), 2: (few, double, case), 4: (case,)}
    figures = {ranks: on_ranks(ranks, _figures, cases[ranks], num_steps) for ranks in CHECKED_RANKS}
    on_one, on_two = figures[1][0]["steps"], figures[2][0]["steps"]
    flops_of_few = {one.batch: count for one, count in zip(cases[1][:3], figures[1][0]["flops"], strict=False)}
    table_bytes = ADAM_PASSES * on_one[3]["learning_bytes"]
    counted = Counted.fitted(flops_of_few, case.batch, figures[1][0]["flops"][3], table_bytes)
    payload = Payload.fitted(2, (few.batch, on_two[0]), (double.batch, on_two[1]))
    seconds = {one.batch: of["fastest_step_s"] for one, of in zip(cases[1][:2], on_one, strict=False)}
    worker = counted.worker(seconds, case.batch, on_one[3]["fastest_step_s"])
    checks = [_check(case, worker, payload, figures[ranks]) for ranks in CHECKED_RANKS]
    return Known(worker, counted, payload, checks)


def _figures(team: Team, cases: tuple[Case, ...], num_steps: int) -> dict[str, Any]:
    """On one rank: steps of each case, on one process their FLOPs too, and this machine's loopback."""
    return {
        "steps": [measure(team, case, num_steps) for case in cases],
        "flops": [flops(team, case) for case in cases] if team.world_size == 1 else [],
        "loopback": _loopback(team) if team.world_size > 1 else None,
    }


def _check(case: Case, worker: Worker, payload: Payload, figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Predicted beside measured, the batch divided among processes that share this machine's cores. figures: of every
    rank, the case's own the last."""
    ranks, loopback = len(figures), figures[0]["loopback"]
    sent = payload.sent_bytes(ranks, case.batch)
    predicted_s = worker.seconds(ranks, case.batch) * max(1.0, ranks / _cores())
    if loopback:
        predicted_s += loopback.seconds(ranks, sent, payload.calls)
    measured_s = max(one["steps"][-1]["fastest_step_s"] for one in figures)
    return {
        "stage": case.stage,
        "processes": ranks,
        "measured_ms": round(measured_s * 1e3, 2),
        "predicted_ms": round(predicted_s * 1e3, 2),
        "predicted_over_measured": round(predicted_s / measured_s, 3),
        "counted_bytes": round(sum(one["steps"][-1]["sent_bytes"] for one in figures) / ranks),
        "predicted_bytes": round(sent),
        "loopback": asdict(loopback) if loopback else None,
    }


def _loopback(team: Team) -> Network:
    """Of the processes of this machine: a large all-reduce tells the bandwidth, a small one the latency."""
    small_s, large_s = _all_reduce_seconds(team)
    hops = 2 * (team.world_size - 1).bit_length()
    sent = 2 * (team.world_size - 1) / team.world_size * LARGE_ELEMENTS * 4
    return Network(sent * 8 / max(large_s - small_s, 1e-9) / 1e9, small_s / hops)


def _all_reduce_seconds(team: Team) -> tuple[float, float]:
    """Of a small and a large one: the median of many."""
    medians = []
    for count in (SMALL_ELEMENTS, LARGE_ELEMENTS):
        tensor, durations = torch.ones(count, device=team.device), []
        for _ in range(15):
            start = time.perf_counter()
            team.all_reduce_sum(tensor)
            durations.append(time.perf_counter() - start)
        medians.append(sorted(durations)[len(durations) // 2])
    return medians[0], medians[1]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _tables(rows: dict[str, list[dict[str, Any]]]) -> str:
    return "\n".join(f"{name} scaling\n\n{table(COLUMNS, own)}" for name, own in rows.items())
