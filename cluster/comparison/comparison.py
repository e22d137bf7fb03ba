"""Two or more runs compared: what they were told, what they reach, and how sure each difference is.

    settings and query results of each run ──▶ [comparison] ──▶ tables, page, JSON

Every run is compared with the first. All intervals are of 95 %, one at a time: of twenty differences that are none,
one is expected to look like one.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clipreid.statistics.bootstrap import Difference, Estimate, IdentityBootstrap
from cluster.comparison.query_results import QueryResults

OWN_SETTINGS = ("run.dir",)
"""Settings in which any two runs differ."""
UNSET = "-"
"""In place of a setting that a run of another version does not have."""


@dataclass(frozen=True)
class Comparison:
    """What is known of R runs, in the order in which they were named."""

    names: list[str]
    settings: dict[str, list[Any]]
    """Those that differ: a value for each run."""
    figures: list[dict[str, Estimate]]
    """Of each run, by name; fractions."""
    differences: list[dict[str, Difference]]
    """Of each run but the first, less those of the first."""
    identities: int
    queries: int
    resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """One tree of plain values."""
        runs = [
            {"name": name, "figures": {figure: asdict(estimate) for figure, estimate in figures.items()}}
            for name, figures in zip(self.names, self.figures, strict=True)
        ]
        for run, differences in zip(runs[1:], self.differences, strict=True):
            run["differences"] = {figure: asdict(each) for figure, each in differences.items()}
        facts = {name: getattr(self, name) for name in ("identities", "queries", "resamples", "seed")}
        return {"runs": runs, "settings": self.settings, **facts}


@dataclass(frozen=True)
class Change:
    """A query that one run ranks otherwise than another."""

    number: int
    """Among the queries of their `QueryResults`."""
    AP: tuple[float, float]
    """In the first and in the other."""
    first_rank: tuple[int, int]


def compare(
    names: list[str], settings: Sequence[dict[str, Any]], results: Sequence[QueryResults], resamples: int, seed: int
) -> Comparison:
    """settings: flat, of each run. results: of the same queries."""
    bootstrap = IdentityBootstrap(results[0].identities, resamples, seed)
    labels = list(results[0].values())
    tables = [np.stack(list(each.values().values()), axis=1) for each in results]
    return Comparison(
        names,
        differing(settings),
        [dict(zip(labels, bootstrap.estimates(table), strict=True)) for table in tables],
        [dict(zip(labels, bootstrap.differences(table, tables[0]), strict=True)) for table in tables[1:]],
        bootstrap.num_identities,
        len(tables[0]),
        resamples,
        seed,
    )


def differing(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The settings, flat, that are not the same in all runs, with a value for each."""
    keys = dict.fromkeys(key for each in settings for key in each if key not in OWN_SETTINGS)
    rows = {key: [each.get(key, UNSET) for each in settings] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def most_changed(before: QueryResults, after: QueryResults, count: int) -> list[Change]:
    """The queries whose AP changed most, up or down, the most changed first; those that did not change are left out."""
    change = np.abs(after.AP - before.AP)
    order = np.argsort(-change, kind="stable")[:count]
    return [
        Change(
            int(number),
            (float(before.AP[number]), float(after.AP[number])),
            (int(before.first_rank[number]), int(after.first_rank[number])),
        )
        for number in order
        if change[number]
    ]


def short_names(runs: Sequence[str]) -> list[str]:
    """The last parts of their paths, where those tell them apart; else the paths."""
    last = [run.rstrip("/").rpartition("/")[2] for run in runs]
    return last if len(set(last)) == len(last) else list(runs)
