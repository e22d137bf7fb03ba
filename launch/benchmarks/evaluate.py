"""Seconds and memory of exact retrieval measures, beside the bare product of all queries with the gallery.

Timed from features to measures: CMC, mAP, mINP and TPR@FPR. The features lie on a grid, so that their distances are
exact in float32, and a sample of queries has to get what the plain version finds: a row of distances to the whole
gallery, sorted. The gallery of `million` is a file that is mapped into memory.
"""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipreid.retrieval.metrics import Retrieval, retrieve
from clipreid.retrieval.positives import Labels
from launch.cli import Parser, place, positive
from launch.measure.made_features import SIZES, Size, add_size_options, chosen_size, make_sets, mapped
from launch.measure.memory import PeakMemory, seconds_and_memory
from launch.measure.timing import choose_device, machine_facts, seconds

EXAMPLE = """examples:
  python launch/bench.py evaluate --size msmt17
  python launch/bench.py evaluate --size million --rounds 1

The aims on 2 CPU cores: msmt17 within 1.5 times the bare product and 0.5 GB above the features; million within 10
minutes and 3 GB with its features."""
ALL_SIZES = SIZES | {"million": Size(10_000, 1_000_000, 50_000, 20, width=512)}
GRID = 1024
"""Steps in a length of 1: lengths and products are whole multiples of 1 / GRID², and fewer than 2^24 of them."""
BLOCK = 4096  # rows at a time
Sides = tuple[Tensor, Labels, Tensor, Labels]


def run(arguments: list[str]) -> dict[str, Any]:
    options, size = _options(arguments)
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory(prefix="evaluate-bench-", dir=options.dir) as folder, PeakMemory() as whole:
        allocate = mapped(str(Path(folder) / "gallery.npy")) if options.size == "million" else torch.empty
        (query, query_labels), (gallery, gallery_labels) = make_sets(size, allocate)
        for features in (*query.split(BLOCK), *gallery.split(BLOCK)):
            features.mul_(GRID).round_().div_(GRID)
        sides = query.to(device), query_labels, gallery.to(device), gallery_labels
        figures, found = _compare(sides, options.rounds)
    figures["peak_memory_mb"] = round(whole.peak_bytes / 1e6)
    figures["sample"] = min(options.sample, size.queries)
    figures["sample_equals_plain"] = _equal_to_plain(found, sides, figures["sample"])
    return {"bench": "evaluate", **machine_facts(device), **asdict(size), "rounds": options.rounds, **figures}


def _options(arguments: list[str]) -> tuple[argparse.Namespace, Size]:
    parser = Parser(prog="bench.py evaluate", description=__doc__, epilog=EXAMPLE)
    add_size_options(parser, ALL_SIZES)
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="times that both are timed (default 3)")
    parser.add_argument(
        "--sample", type=positive, default=100, metavar="N", help="queries that the plain version ranks (default 100)"
    )
    parser.add_argument(
        "--dir", type=place, metavar="FOLDER", help="of the mapped gallery; default: the system's temporary folder"
    )
    parser.add_argument("--device", help="default: cuda where there is one")
    options = parser.parse_args(arguments)
    return options, chosen_size(options, ALL_SIZES)


def _compare(sides: Sides, rounds: int) -> tuple[dict[str, Any], Retrieval]:
    """Both in turn, after a product that warms up and brings a mapped gallery into memory."""
    query, _, gallery, _ = sides
    found: list[Retrieval] = []

    def ours() -> dict[str, Any]:
        found[:] = [retrieve(*sides, rule="camera")]
        return found[0].metrics()

    bare_product(query, gallery)
    product_s, runs = [], []
    for _ in range(rounds):
        product_s.append(seconds(lambda: bare_product(query, gallery), query.device))
        runs.append(seconds_and_memory(ours, query.device))
    most = {name: max(run[name] for run in runs) for name in runs[0] if "memory" in name}
    ratio = median(run["seconds"] / bare for run, bare in zip(runs, product_s, strict=True))
    figures = {
        "seconds": median(run["seconds"] for run in runs),
        "product_s": round(median(product_s), 4),
        "times_product": round(ratio, 3),
        **most,
        "metrics": runs[0]["metrics"],
    }
    return figures, found[0]


def bare_product(query: Tensor, gallery: Tensor) -> None:
    """Every query times every gallery image, a block of these at a time into the same memory."""
    block = query.new_empty(len(query), BLOCK)
    for rows in gallery.split(BLOCK):
        torch.mm(query, rows.T, out=block[:, : len(rows)])


def _equal_to_plain(found: Retrieval, sides: Sides, sample: int) -> bool:
    """Whether AP, first rank and number of positives of evenly spaced queries are those of the plain version."""
    rows = np.linspace(0, len(sides[0]) - 1, sample).astype(int)
    expected = np.array([_plain(sides, row) for row in rows])
    ours = np.stack([values[rows] for values in (found.per_query.AP, found.per_query.first_rank)], 1)
    return bool(np.allclose(ours, expected, rtol=0, atol=1e-12, equal_nan=True))


def _plain(sides: Sides, row: int) -> tuple[float, int]:
    """AP and first rank of one query by sorting the gallery; NaN and 0 without a positive."""
    query, query_labels, gallery, gallery_labels = sides
    distances = torch.cat([part.square().sum(1) - 2 * part @ query[row] for part in gallery.split(BLOCK)])
    order = np.argsort(distances.cpu().numpy(), kind="stable")
    same = gallery_labels.identities[order] == query_labels.identities[row]
    assert query_labels.cameras is not None and gallery_labels.cameras is not None
    junk = same & (gallery_labels.cameras[order] == query_labels.cameras[row])
    ranks = np.flatnonzero(same[~junk]) + 1
    if not len(ranks):
        return float("nan"), 0
    return float((np.arange(1, len(ranks) + 1) / ranks).mean()), int(ranks[0])
