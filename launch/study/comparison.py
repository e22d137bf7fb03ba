"""Two ways of training compared on the same queries: the difference of mAP, and how sure it is.

    queries.csv of each run ──▶ [comparison] ──▶ difference with its interval ──▶ report

AP is averaged over seeds, and the identities of the queries are drawn (`clipreid/statistics`): the interval holds for
other vehicles.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clipreid.statistics.bootstrap import Difference, IdentityBootstrap
from shards.loading.index import ShardIndex

RESAMPLES = 10_000

QueryAP = Mapping[str, float]
"""AP by the key of a query."""


def identities(shards: str) -> dict[str, str]:
    """Whose image each query of a packed dataset is, by its key."""
    split = ShardIndex.open(shards).split("query")
    return dict(zip(map(str, split.keys), map(str, split.identity), strict=True))


def query_ap(queries: Path) -> QueryAP:
    """Of an evaluation's queries that have a match."""
    with queries.open(newline="") as file:
        return {row["query"]: float(row["AP"]) for row in csv.DictReader(file) if row["AP"]}


def compare(one: Sequence[QueryAP], other: Sequence[QueryAP], identity_of: Mapping[str, str]) -> Difference:
    """mAP of `one` less that of `other`, each given for every seed."""
    keys = sorted(one[0])
    assert all(sorted(run) == keys for run in (*one, *other)), "runs are of one dataset"
    bootstrap = IdentityBootstrap(np.array([identity_of[key] for key in keys]), RESAMPLES, seed=0)
    (difference,) = bootstrap.differences(_mean_over_seeds(one, keys), _mean_over_seeds(other, keys))
    return difference


def _mean_over_seeds(runs: Sequence[QueryAP], keys: Sequence[str]) -> np.ndarray:
    """float64 [Q, 1]."""
    return np.mean([[run[key] for key in keys] for run in runs], axis=0)[:, None]
