"""What a model makes of each query, so that two models can be compared query by query.

    inference + shards ──▶ [query results] ──▶ comparison, page

Of VehicleID, whose queries differ from draw to draw, they are those of all draws of the largest list, one after the
other: every draw has as many, so that the mean over all of them is the mean over the draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from clipreid.retrieval.metrics import Retrieval, retrieve
from clipreid.retrieval.vehicleid import draw_gallery, largest_list, vehicleid_draw
from cluster.evaluation.inference import Inference
from cluster.evaluation.metrics import ShowProgress, labels_of
from shards.loading.index import ShardIndex, SplitIndex


@dataclass(frozen=True)
class QueryResults:
    """Of the Q queries that have a match, in an order that the dataset alone decides."""

    query: SplitIndex
    gallery: SplitIndex
    rows: np.ndarray
    """int64 [Q], row numbers of the query split."""
    AP: np.ndarray
    """float64 [Q]."""
    INP: np.ndarray
    """float64 [Q]."""
    first_rank: np.ndarray
    """int64 [Q], from 1."""
    nearest: np.ndarray
    """int64 [Q, k], row numbers of the gallery split, nearest first; -1 where there are no more."""
    distances: np.ndarray
    """float32 [Q, k], Euclidean, of these."""

    @property
    def identities(self) -> np.ndarray:
        """int64 [Q], codes of the index."""
        return self.query.identity_codes[self.rows]

    def values(self) -> dict[str, np.ndarray]:
        """What the figures are the means of, float64 [Q], by the figures' names in metrics.json."""
        ranks = {f"R{rank}": (self.first_rank <= rank).astype(float) for rank in (1, 5, 10)}
        whole = {"mAP": self.AP, "mINP": self.INP, **ranks}
        names = ("mAP", "R1", "R5") if self.query.name == "test" else tuple(whole)
        return {name: whole[name] for name in names}


def query_results(inference: Inference, index: ShardIndex, show: ShowProgress, nearest: int) -> QueryResults:
    """The same on every rank. nearest: k, images of each ranked list; 0: none. Raises as `Inference.evaluate`."""
    parts = list(
        _draws(inference, index, show, nearest) if "test" in index.splits else _once(inference, index, show, nearest)
    )
    names = ("test", "test") if "test" in index.splits else ("query", "gallery")
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return QueryResults(index.split(names[0]), index.split(names[1]), *columns)


Columns = tuple[np.ndarray, ...]
"""rows, AP, INP, first_rank, nearest, distances of some queries."""


def _once(inference: Inference, index: ShardIndex, show: ShowProgress, nearest: int) -> Iterator[Columns]:
    rule, team = inference.config.eval.rule, inference.team
    query, gallery = index.split("query"), index.split("gallery")
    features = torch.from_numpy(np.array(inference.encode(index, "query", show))).to(team.device)
    found = retrieve(
        features,
        labels_of(query, rule),
        inference.encode(index, "gallery", show),
        labels_of(gallery, rule),
        rule=rule,
        top_k=nearest,
        peers=team.patiently("merge evaluation"),
    )
    yield _columns(found, np.arange(len(query)), np.arange(len(gallery)))


def _draws(inference: Inference, index: ShardIndex, show: ShowProgress, nearest: int) -> Iterator[Columns]:
    config, team, test = inference.config, inference.team, index.split("test")
    members = largest_list(test.identity_codes, test.lists)
    codes = test.identity_codes[members]
    features = torch.from_numpy(np.array(inference.encode(index, "test", show))[members]).to(team.device)
    for draw in range(config.eval.draws):
        chosen = draw_gallery(codes, config.run.seed, draw)
        found = vehicleid_draw(features, codes, chosen, team.patiently("merge evaluation"), top_k=nearest)
        yield _columns(found, np.delete(members, chosen), members[chosen])


def _columns(found: Retrieval, query_rows: np.ndarray, gallery_rows: np.ndarray) -> Columns:
    """Of the valid queries, with row numbers of the splits."""
    each = found.per_query
    valid = each.positives > 0
    rows, distances = np.empty((len(valid), 0), np.int64), np.empty((len(valid), 0), np.float32)
    if found.nearest:
        places, distances = found.nearest.rows, found.nearest.distances
        rows = np.where(places >= 0, gallery_rows[places], -1)
    columns = (query_rows, each.AP, each.INP, each.first_rank, rows, distances)
    return tuple(column[valid] for column in columns)
