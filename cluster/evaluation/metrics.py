"""From descriptors or feature files to metrics, on many workers.

    evaluate, feature files ── descriptors ──▶ [metrics] ──▶ metrics.json

The distances are counted by `clipreid.retrieval`; its sums over ranks are the team's. No encoder is needed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
import torch

from clipreid.errors import ModelError
from clipreid.retrieval.metrics import retrieve
from clipreid.retrieval.positives import Labels
from clipreid.retrieval.rerank import evaluate_reranked
from clipreid.retrieval.rules import RULES, Rule
from clipreid.retrieval.vehicleid import vehicleid
from cluster.evaluation.feature_file import FeatureSet
from cluster.evaluation.features import Progress, no_progress
from cluster.evaluation.open_set import OpenSetSettings, open_set_metrics, open_set_of_test
from cluster.evaluation.per_query import PerQueryFile
from cluster.ranks.team import Team
from cluster.settings.config import Config
from shards.loading.index import ShardIndex, SplitIndex

UNIT_TOLERANCE = 1e-6
"""How far the length of a row that was normalised in float32 may be from 1."""
BLOCK_ROWS = 8192
ShowProgress = Callable[[str], AbstractContextManager[Progress]]
"""show(what is done): a block in which progress(done, total) is seen."""


@contextmanager
def show_nothing(doing: str) -> Iterator[Progress]:
    yield no_progress


@dataclass(frozen=True)
class RetrievalSettings:
    """How queries are compared with a gallery, and what is said of them."""

    rule: Rule
    """Gallery images of the query's identity that do not count: those of its camera, none, or camera_time."""
    rerank: tuple[int, int, float] | None = None
    """k1, k2, lambda: the same metrics of the re-ranked distances as well, under "rerank"."""
    per_query: PerQueryFile | None = None
    """Written by the first rank; of the plain distances."""
    open_set: OpenSetSettings | None = None
    """Of the plain distances as well, under "open_set"."""


@dataclass(frozen=True)
class DrawSettings:
    """The random galleries of the VehicleID protocol."""

    draws: int
    seed: int
    open_set: OpenSetSettings | None = None
    """As in `RetrievalSettings`."""


@dataclass(frozen=True)
class RetrievalSet:
    """The queries, or the gallery."""

    features: np.ndarray
    """float32 [n, D], the same on every rank; the gallery's may be memory-mapped."""
    labels: Labels
    keys: np.ndarray | None = None
    """Strings [n], for the per-query file."""

    @classmethod
    def of_split(cls, features: np.ndarray, split: SplitIndex, settings: RetrievalSettings) -> "RetrievalSet":
        """With the strings of every image only where they are asked for."""
        return cls(features, labels_of(split, settings.rule), split.keys if settings.per_query else None)


def measure(
    descriptors: Callable[[str], np.ndarray],
    index: ShardIndex,
    config: Config,
    team: Team,
    show: ShowProgress = show_nothing,
    per_query: PerQueryFile | None = None,
    open_set: OpenSetSettings | None = None,
) -> dict[str, Any]:
    """The metrics of a packed dataset by its protocol, the same on every rank, as `evaluate.evaluate` gives them.

    descriptors: asked for those of a whole split by its name, float32 [n, D].
    per_query: not for VehicleID, whose queries differ from draw to draw.
    """
    if "test" in index.splits:
        test = index.split("test")
        draws = DrawSettings(config.eval.draws, config.run.seed, open_set)
        return vehicleid_metrics(np.array(descriptors("test")), test.identity_codes, test.lists, draws, team)
    settings = RetrievalSettings(config.eval.rule, config.eval.rerank, per_query, open_set)
    query = RetrievalSet.of_split(np.array(descriptors("query")), index.split("query"), settings)
    gallery = RetrievalSet.of_split(descriptors("gallery"), index.split("gallery"), settings)
    return retrieval_metrics(query, gallery, settings, team, show)


def metrics_of_pair(
    query: FeatureSet,
    gallery: FeatureSet,
    *,
    normalize: bool,
    settings: RetrievalSettings,
    team: Team,
    show: ShowProgress = show_nothing,
) -> dict[str, Any]:
    """Metrics of feature files, the same on every rank. normalize: features are scaled to length 1.

    Raises ModelError for features that are not finite, and where no query has a valid match or no identity is known.
    """
    _check_identities(query, gallery)
    # A block of rows at a time is all that is asked of the gallery, and this much of an array `Rows` is.
    rows = cast(np.ndarray, Rows(gallery, normalize))
    return retrieval_metrics(
        RetrievalSet(Rows(query, normalize)[:], _labels_of_file(query), query.keys),
        RetrievalSet(rows, _labels_of_file(gallery), gallery.keys),
        settings,
        team,
        show,
    )


def metrics_of_test(test: FeatureSet, *, normalize: bool, draws: DrawSettings, team: Team) -> dict[str, Any]:
    """The VehicleID protocol on a feature file. Raises as `metrics_of_pair`, and where no image is in a test list."""
    _check_identities(test)
    assert test.lists is not None, "read_test refuses a file without them"
    return vehicleid_metrics(Rows(test, normalize)[:], test.identities, test.lists, draws, team)


def retrieval_metrics(
    query: RetrievalSet,
    gallery: RetrievalSet,
    settings: RetrievalSettings,
    team: Team,
    show: ShowProgress = show_nothing,
) -> dict[str, Any]:
    """mAP, mINP, R1, …, the same on every rank."""
    show = show if team.is_first else show_nothing
    rule, per_query = settings.rule, settings.per_query
    peers = team.patiently("merge evaluation")
    on_device = torch.from_numpy(query.features).to(team.device)
    sets = on_device, query.labels, gallery.features, gallery.labels
    top_k = per_query.top_k if per_query else 0
    with show("compare with the gallery") as progress:
        result = retrieve(*sets, rule=rule, top_k=top_k, peers=peers, progress=progress)
    if per_query and team.is_first:
        per_query.write(result, query.keys, gallery.keys)
    metrics = result.metrics()
    if settings.rerank:
        k1, k2, lam = settings.rerank
        with show("re-rank") as progress:
            metrics["rerank"] = evaluate_reranked(
                *sets, rule=rule, k1=k1, k2=k2, lam=lam, peers=peers, progress=progress
            )
    if settings.open_set:
        sides = (query.features, query.labels), (gallery.features, gallery.labels)
        with show("search for strangers") as progress:
            metrics["open_set"] = open_set_metrics(*sides, rule, settings.open_set, team, progress)
    return metrics


def vehicleid_metrics(
    features: np.ndarray, identities: np.ndarray, lists: np.ndarray, settings: DrawSettings, team: Team
) -> dict[str, Any]:
    """`small`, `medium`, `large`, each with mean and std over the draws. Features float32 [n, D] of split test."""
    on_device = torch.from_numpy(features).to(team.device)
    peers = team.patiently("merge evaluation")
    metrics = vehicleid(on_device, identities, lists, draws=settings.draws, seed=settings.seed, peers=peers)
    if settings.open_set:
        metrics["open_set"] = open_set_of_test(features, identities, lists, settings.open_set, team)
    return metrics


class Rows:
    """Features of a file, float32 [n, D], of length 1 with `normalize`: made from the file's a few rows at a time.

    Raises ModelError with file, row and key for a value that is not finite.
    """

    def __init__(self, file: FeatureSet, normalize: bool):
        self.file, self.normalize = file, normalize

    def __len__(self) -> int:
        return len(self.file.features)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        block = np.array(self.file.features[rows], np.float32)
        finite = np.isfinite(block).all(1)
        if not finite.all():
            self._refuse(np.arange(len(self))[rows][np.argmin(finite)])
        if self.normalize:
            normalize_rows(block)
        return block

    def _refuse(self, row: int) -> NoReturn:
        key = "" if self.file.keys is None else f" (key {self.file.keys[row]})"
        raise ModelError(
            f"{self.file.source}: row {row}{key} holds values that are not finite: extract it again, and if they come "
            "again look at the weights, which may not be finite either"
        )


def _check_identities(*sets: FeatureSet) -> None:
    """Refuse a set of which nothing is known before its features are read: an extraction of a plain folder."""
    for file in sets:
        if not _labels_of_file(file).known.any():
            raise ModelError(
                f"{file.source}: nothing to evaluate, none of {len(file.identities):,} images has an identity (empty "
                "or -1 is unknown): write their identities into the file, or pack the images with `pack.py build "
                "--dataset manifest` and extract the splits"
            )


def normalize_rows(features: np.ndarray) -> None:
    """Scale the rows, float32 [n, D], to length 1 in place.

    Those that have it already keep every bit, so that an extraction gives the very figures of its run.
    """
    for start in range(0, len(features), BLOCK_ROWS):
        rows = torch.from_numpy(features[start : start + BLOCK_ROWS])
        length = rows.norm(dim=1, keepdim=True).clamp_min_(torch.finfo(rows.dtype).tiny)
        rows /= length.where((length - 1).abs() > UNIT_TOLERANCE, 1.0)


def labels_of(split: SplitIndex, rule: Rule) -> Labels:
    """Without times, a string for every image, where the rule does not compare them."""
    return Labels(split.identity_codes, split.cameras, split.times if "times" in RULES[rule] else None)


def _labels_of_file(file: FeatureSet) -> Labels:
    return Labels(file.identities, file.cameras, file.times)
