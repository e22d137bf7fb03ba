"""Test protocols that draw their own queries and gallery: VehicleID.

    features of the test split ──▶ [vehicleid: draws] ──▶ metrics of each draw ──▶ [vehicleid: means]

Of every identity of a test list one image, drawn at random, forms the gallery, and all its other images are queries.
The draws follow from a seed, so every rank makes the same ones.
"""

from typing import Any

import numpy as np
from torch import Tensor

from clipreid.errors import ModelError
from clipreid.peers import ALONE, Peers
from clipreid.retrieval.metrics import Retrieval, retrieve
from clipreid.retrieval.positives import Labels

LISTS = {"small": "800", "medium": "1600", "large": "2400"}
"""Name in metrics.json -> name of the test list."""


def vehicleid(
    features: Tensor,
    identities: np.ndarray,
    lists: np.ndarray,
    *,
    draws: int,
    seed: int,
    peers: Peers = ALONE,
) -> dict[str, dict[str, Any]]:
    """{"small": {"R1": {"mean": …, "std": …}, "R5": …, "mAP": …, "queries": …, "gallery": …}, "medium": …}.

    features: float [n, D]. identities: [n]. lists: strings [n], the test lists that hold each image
    ("800,1600,2400"); a size whose list holds no image is left out. The deviation is that of the draws
    themselves (divided by their number); one draw has none, and no "std". Images of unknown identity, of which nobody
    can say whether they are a query's match, take no part, and are counted as "unknown_identity".
    Raises ModelError where no image is in any list, and for a list without a query.
    """
    results = {}
    for size, name in LISTS.items():
        rows, unknown = list_members(identities, lists, name)
        if not len(rows) + unknown:
            continue
        _check_some_query(name, identities[rows], unknown)
        trials = [
            vehicleid_draw(features[rows], identities[rows], draw_gallery(identities[rows], seed, draw), peers)
            for draw in range(draws)
        ]
        results[size] = _summary(trials, len(rows)) | ({"unknown_identity": unknown} if unknown else {})
    if not results:
        raise ModelError(f"no test image is in a list named {', '.join(LISTS.values())}: pack VehicleID's test split.")
    return results


def list_members(identities: np.ndarray, lists: np.ndarray, name: str) -> tuple[np.ndarray, int]:
    """Row numbers, int64, of a test list's images of known identity, and how many others it holds."""
    holds = {entry: name in entry.split(",") for entry in set(lists.tolist())}  # few different ones, of many images
    listed = np.fromiter((holds[entry] for entry in lists.tolist()), bool, len(lists))
    known = Labels(identities).known
    return np.flatnonzero(listed & known), int((listed & ~known).sum())


def largest_list(identities: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Row numbers, int64, of the images of known identity in the largest test list that has any. Raises ModelError."""
    for name in reversed(LISTS.values()):
        rows, _ = list_members(identities, lists, name)
        if len(rows):
            return rows
    raise ModelError("no image of split test that has an identity is in a test list; pack it with both")


def draw_gallery(identities: np.ndarray, seed: int, draw: int) -> np.ndarray:
    """One row number for every identity, in sorted order of the identities. int64 [identities]."""
    order = np.argsort(identities, kind="stable")
    _, first, counts = np.unique(identities[order], return_index=True, return_counts=True)
    rows: np.ndarray = order[first + np.random.default_rng([seed, draw]).integers(counts)]
    return rows


def vehicleid_draw(
    features: Tensor,
    identities: np.ndarray,
    gallery_rows: np.ndarray,
    peers: Peers = ALONE,
    *,
    top_k: int = 0,
) -> Retrieval:
    """One draw: these rows are the gallery, all others the queries; no camera rule. top_k: as in `retrieve`."""
    query_rows = np.setdiff1d(np.arange(len(identities)), gallery_rows)
    return retrieve(
        features[query_rows],
        Labels(identities[query_rows]),
        features[gallery_rows],
        Labels(identities[gallery_rows]),
        rule="none",
        top_k=top_k,
        peers=peers,
    )


def _check_some_query(name: str, identities: np.ndarray, unknown: int) -> None:
    if len(np.unique(identities)) < len(identities):
        return
    fault = "every identity has one image only, which the gallery takes"
    if not len(identities):
        fault = f"none of its {unknown} images has a known identity (empty or -1 is unknown)"
    raise ModelError(f"test list {name}: {fault}: no query is left to evaluate; give its images their identities.")


def _summary(trials: list[Retrieval], images: int) -> dict[str, Any]:
    figures = [trial.metrics() for trial in trials]

    def over_draws(name: str) -> dict[str, float]:
        values = [figure[name] for figure in figures]
        spread = {"std": float(np.std(values))} if len(values) > 1 else {}
        return {"mean": float(np.mean(values)), **spread}

    queries = trials[0].queries
    return {name: over_draws(name) for name in ("R1", "R5", "mAP")} | {"queries": queries, "gallery": images - queries}
