"""Seconds and memory of k-reciprocal re-ranking, beside the bare product of all features with all features.

Timed from features to measures. The bare product is that of all queries and gallery images with each other, block by
block into the same memory: without it no version finds an image's neighbours. The plain version holds every distance
and every weight in matrices of all images x all images, as is usual; it is for small sizes.
"""

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipreid.retrieval.metrics import retrieve, retrieve_by_distance
from clipreid.retrieval.positives import Labels
from clipreid.retrieval.rerank import BLOCK, evaluate_reranked
from launch.cli import Parser
from launch.evaluate import rerank_settings
from launch.measure.made_features import SIZES, Size, add_size_options, chosen_size, make_sets
from launch.measure.memory import seconds_and_memory
from launch.measure.timing import choose_device, machine_facts, seconds

EXAMPLE = """examples:
  python launch/bench.py rerank --size msmt17
  python launch/bench.py rerank --size msmt17 --settings 50,15,0.3
  python launch/bench.py rerank --queries 300 --gallery 1500 --identities 60 --plain

The aims on 2 CPU cores: market under 2 minutes and 1 GB above the features, msmt17 under 15 minutes and 6 GB."""


def run(arguments: list[str]) -> dict[str, Any]:
    options, size = _options(arguments)
    device = choose_device(options.device)
    (query, query_labels), (gallery, gallery_labels) = make_sets(size)
    query, gallery = query.to(device), gallery.to(device)
    sides = query, query_labels, gallery, gallery_labels
    k1, k2, lam = options.settings
    settings = {"k1": k1, "k2": k2, "lam": lam}
    result = {"bench": "rerank", **machine_facts(device), **asdict(size), **settings}
    result["metrics"] = retrieve(*sides, rule="camera").metrics()
    result["rerank"] = ours = seconds_and_memory(lambda: evaluate_reranked(*sides, rule="camera", **settings), device)
    result["product_s"] = round(seconds(lambda: bare_product(query, gallery), device), 4)
    result["times_product"] = round(ours["seconds"] / result["product_s"], 2)
    if options.plain:
        result["plain"] = seconds_and_memory(lambda: plain(*sides, **settings), device)
        result["equal_to_plain"] = all(
            abs(value - result["plain"]["metrics"][name]) < 1e-6 for name, value in ours["metrics"].items()
        )
    return result


def _options(arguments: list[str]) -> tuple[argparse.Namespace, Size]:
    parser = Parser(prog="bench.py rerank", description=__doc__, epilog=EXAMPLE)
    add_size_options(parser, SIZES)
    parser.add_argument("--settings", type=rerank_settings, default=(20, 6, 0.3), metavar="K1,K2,LAMBDA")
    parser.add_argument("--plain", action="store_true", help="also the version with whole matrices")
    parser.add_argument("--device", help="default: cuda where there is one")
    options = parser.parse_args(arguments)
    return options, chosen_size(options, SIZES)


def bare_product(query: Tensor, gallery: Tensor) -> None:
    """Every feature times every other, a block of rows at a time into the same memory."""
    features = torch.cat([query, gallery])
    block = features.new_empty(BLOCK, len(features))
    for rows in features.split(BLOCK):
        torch.mm(rows, features.T, out=block[: len(rows)])


def plain(
    query: Tensor, query_labels: Labels, gallery: Tensor, gallery_labels: Labels, *, k1: int, k2: int, lam: float
) -> dict[str, Any]:
    """Metrics by way of four matrices [n, n] and a loop over the images. On the CPU."""
    features = torch.cat([query, gallery]).cpu().numpy()
    squared = np.square(features).sum(1)
    original = squared[:, None] + squared - 2 * features @ features.T
    np.fill_diagonal(original, 0)
    original = np.maximum(original, 0) / original.max(1, keepdims=True)
    order = np.argsort(original, axis=1)
    n, num_queries = len(features), len(query)

    def reciprocal(i: int, k: int) -> np.ndarray:
        near = order[i, : k + 1]
        return near[(order[near, : k + 1] == i).any(1)]

    weights = np.zeros((n, n), np.float32)
    for i in range(n):
        own = members = reciprocal(i, k1)
        for j in own:
            theirs = reciprocal(j, round(k1 / 2))
            if 3 * len(np.intersect1d(theirs, own)) > 2 * len(theirs):
                members = np.union1d(members, theirs)
        values = np.exp(-original[i, members])
        weights[i, members] = values / values.sum()
    weights = np.stack([weights[order[i, :k2]].mean(0) for i in range(n)])
    distances = np.empty((num_queries, n - num_queries), np.float32)
    for i in range(num_queries):
        shared = np.minimum(weights[i], weights[num_queries:]).sum(1)
        distances[i] = lam * original[i, num_queries:] + (1 - lam) * (1 - shared / (2 - shared))
    return retrieve_by_distance(torch.from_numpy(distances), query_labels, gallery_labels, rule="camera").metrics()
