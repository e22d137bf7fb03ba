"""Seconds and memory of k-reciprocal re-ranking, beside the bare product of all features with all features.

Timed from features to measures. The bare product is that of all queries and gallery images with each other, block by
block into the same memory: without it no version finds an image's neighbours. The plain version holds every distance
and every weight in matrices of all images x all images, as is usual; it is for small sizes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipreid.rerank import BLOCK, evaluate_reranked
from clipreid.retrieval import Labels, retrieve, retrieve_by_distance
from launch.benchmarks._memory import PeakMemory
from launch.benchmarks._timing import choose_device, facts, peak_memory_bytes, seconds
from launch.cli import Parser
from launch.evaluate import positive, rerank_settings

EXAMPLE = """examples:
  python launch/bench.py rerank --size msmt17
  python launch/bench.py rerank --size msmt17 --settings 50,15,0.3
  python launch/bench.py rerank --queries 300 --gallery 1500 --identities 60 --plain

The aims on 2 CPU cores: market under 2 minutes and 1 GB above the features, msmt17 under 15 minutes and 6 GB."""


@dataclass(frozen=True)
class Size:
    queries: int
    gallery: int
    identities: int
    cameras: int
    width: int = 1280


SIZES = {"market": Size(3_368, 15_913, 750, 6), "msmt17": Size(11_659, 82_161, 3_060, 15)}
DIRECTIONS = 96
"""In which identities differ: what a trained encoder tells apart lies in far fewer dimensions than its features."""
CAMERA, IMAGE, NOISE = 0.45, (0.3, 1.8), 0.3
"""Spread of cameras, of images of one identity (from the clearest to the worst), and in all dimensions alike, that of
identities being 1."""


def run(arguments: list[str]) -> dict[str, Any]:
    options, size = _options(arguments)
    device = choose_device(options.device)
    (query, query_labels), (gallery, gallery_labels) = make_sets(size)
    query, gallery = query.to(device), gallery.to(device)
    sides = query, query_labels, gallery, gallery_labels
    k1, k2, lam = options.settings
    settings = {"k1": k1, "k2": k2, "lam": lam}
    result = {"bench": "rerank", **facts(device), **asdict(size), **settings, "metrics": retrieve(*sides).metrics()}
    result["rerank"] = ours = _measured(lambda: evaluate_reranked(*sides, **settings), device)
    result["product_s"] = round(seconds(lambda: bare_product(query, gallery), device), 4)
    result["times_product"] = round(ours["seconds"] / result["product_s"], 2)
    if options.plain:
        result["plain"] = _measured(lambda: plain(*sides, **settings), device)
        result["equal_to_plain"] = all(
            abs(value - result["plain"]["metrics"][name]) < 1e-6 for name, value in ours["metrics"].items()
        )
    return result


def _options(arguments: list[str]):
    parser = Parser(prog="bench.py rerank", description=__doc__, epilog=EXAMPLE)
    parser.add_argument(
        "--size", choices=sorted(SIZES), default="market", help="of a published dataset (default market)"
    )
    for name in ("queries", "gallery", "identities", "cameras", "width"):
        parser.add_argument(f"--{name}", type=positive, metavar="N", help="in place of the size's")
    parser.add_argument("--settings", type=rerank_settings, default=(20, 6, 0.3), metavar="K1,K2,LAMBDA")
    parser.add_argument("--plain", action="store_true", help="also the version with whole matrices")
    parser.add_argument("--device", help="default: cuda where there is one")
    options = parser.parse_args(arguments)
    changes = {name: value for name in asdict(SIZES["market"]) if (value := getattr(options, name))}
    return options, replace(SIZES[options.size], **changes)


def _measured(work: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Seconds and metrics of `work`, and the most memory it held above what was held before."""
    metrics = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    with PeakMemory() as memory:
        duration = seconds(lambda: metrics.update(work()), device)
    result = {"seconds": round(duration, 4), "memory_above_features_mb": round(memory.above_bytes / 1e6)}
    if device.type == "cuda":
        result["gpu_memory_above_features_mb"] = round((peak_memory_bytes(device) - held) / 1e6)
    return result | {"metrics": metrics}


def make_sets(size: Size) -> list[tuple[Tensor, Labels]]:
    """Features of length 1, float32 [n, width], of queries and gallery, and their labels."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(DIRECTIONS, size.width, generator=generator) / DIRECTIONS**0.5
    centres = torch.randn(size.identities, DIRECTIONS, generator=generator)
    shifts = CAMERA * torch.randn(size.cameras, DIRECTIONS, generator=generator)
    sets = []
    for n in (size.queries, size.gallery):
        identity = torch.randint(size.identities, (n,), generator=generator)
        camera = torch.randint(size.cameras, (n,), generator=generator)
        features = torch.empty(n, size.width)
        for rows in torch.arange(n).split(4096):
            clear = torch.empty(len(rows), 1).uniform_(*IMAGE, generator=generator)
            image = clear * torch.randn(len(rows), DIRECTIONS, generator=generator)
            noise = NOISE * torch.randn(len(rows), size.width, generator=generator)
            own = centres[identity[rows]] + shifts[camera[rows]] + image
            features[rows] = normalize(own @ directions + noise)
        sets.append((features, Labels(identity.numpy(), camera.numpy())))
    return sets


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
    return retrieve_by_distance(torch.from_numpy(distances), query_labels, gallery_labels).metrics()
