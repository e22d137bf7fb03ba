"""From descriptors or feature files to metrics, on many workers.

    evaluate, feature files ── descriptors ──▶ [measure] ──▶ metrics

The distances are counted by `clipreid.retrieval`; its sums over ranks are the team's. No encoder is needed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import numpy as np
import torch

from clipreid.errors import ModelError
from clipreid.retrieval.metrics import retrieve
from clipreid.retrieval.positives import Labels
from clipreid.retrieval.rerank import evaluate_reranked
from clipreid.retrieval.vehicleid import vehicleid
from cluster.evaluation.feature_file import FeatureSet
from cluster.evaluation.per_query import PerQueryFile
from cluster.ranks.team import Team

UNIT_TOLERANCE = 1e-6
"""How far the length of a row that was normalised in float32 may be from 1."""
BLOCK_ROWS = 8192
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""progress(what is done): a block with a function to be told (images done, images in all)."""


class Rows:
    """Features of a file, float32 [n, D], of length 1 with `normalize`: made from the file's a few rows at a time.

    Raises ModelError with file, row and key for a value that is not finite.
    """

    def __init__(self, part: FeatureSet, normalize: bool):
        self.part, self.normalize = part, normalize

    def __len__(self) -> int:
        return len(self.part.features)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        block = np.array(self.part.features[rows], np.float32)
        finite = np.isfinite(block).all(1)
        if not finite.all():
            self._refuse(np.arange(len(self))[rows][np.argmin(finite)])
        if self.normalize:
            normalize_rows(block)
        return block

    def _refuse(self, row: int) -> NoReturn:
        key = "" if self.part.keys is None else f" (key {self.part.keys[row]})"
        raise ModelError(
            f"{self.part.source}: row {row}{key} holds values that are not finite: extract it again, and if they come "
            "again look at the weights, which may not be finite either"
        )


@contextmanager
def silent(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A Progress that nobody sees."""
    yield lambda done, total: None


def measure_retrieval(
    query_features: np.ndarray,
    query: Labels,
    gallery_features: np.ndarray | Rows,
    gallery: Labels,
    *,
    rule: str,
    rerank: tuple[int, int, float] | None,
    team: Team,
    progress: Progress = silent,
    per_query: PerQueryFile | None = None,
    keys: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> dict[str, Any]:
    """mAP, mINP, R1, …, and with `rerank` (k1, k2, lambda) the same of the re-ranked distances under "rerank".

    Features float32 [n, D], the same on every rank; the gallery's may be memory-mapped. per_query: written by the
    first rank, with the keys of queries and gallery; of the plain distances.
    """
    progress = progress if team.is_first else silent
    on_device = torch.from_numpy(query_features).to(team.device)
    with progress("compare with the gallery") as on_images:
        result = retrieve(
            on_device, query, gallery_features, gallery, rule=rule, top_k=per_query.top_k if per_query else 0,
            peers=team.patiently("merge evaluation"), progress=on_images,
        )  # fmt: skip
    if per_query and team.is_first:
        per_query.write(result, *keys)
    metrics = result.metrics()
    if rerank:
        k1, k2, weight = rerank
        with progress("re-rank") as on_images:
            metrics["rerank"] = evaluate_reranked(
                on_device, query, gallery_features, gallery, rule=rule, k1=k1, k2=k2, lam=weight,
                peers=team.patiently("merge evaluation"), progress=on_images,
            )  # fmt: skip
    return metrics


def measure_vehicleid(
    features: np.ndarray, identities: np.ndarray, lists: np.ndarray, *, draws: int, seed: int, team: Team
) -> dict[str, Any]:
    """`small`, `medium`, `large`, each with mean and std over the draws. Features float32 [n, D] of split test."""
    return vehicleid(
        torch.from_numpy(features).to(team.device), identities, lists, draws=draws, seed=seed,
        peers=team.patiently("merge evaluation"),
    )  # fmt: skip


def measure_pair(
    query: FeatureSet,
    gallery: FeatureSet,
    *,
    normalize: bool,
    rule: str,
    rerank: tuple[int, int, float] | None,
    team: Team,
    progress: Progress = silent,
    per_query: PerQueryFile | None = None,
) -> dict[str, Any]:
    """Metrics of feature files, the same on every rank. normalize: features are scaled to length 1.

    Raises ModelError for features that are not finite, and where no query has a valid match or no identity is known.
    """
    _check_identities(query, gallery)
    return measure_retrieval(
        Rows(query, normalize)[:], _labels(query), Rows(gallery, normalize), _labels(gallery),
        rule=rule, rerank=rerank, team=team, progress=progress, per_query=per_query,
        keys=(query.keys, gallery.keys),
    )  # fmt: skip


def measure_test(test: FeatureSet, *, normalize: bool, draws: int, seed: int, team: Team) -> dict[str, Any]:
    """The VehicleID protocol on a feature file. Raises as `measure_pair`, and where no image is in a test list."""
    _check_identities(test)
    features = Rows(test, normalize)[:]
    return measure_vehicleid(features, test.identities, test.lists, draws=draws, seed=seed, team=team)


def _check_identities(*sets: FeatureSet) -> None:
    """Refuse a set of which nothing is known before its features are read: an extraction of a plain folder."""
    for part in sets:
        if not _labels(part).known.any():
            raise ModelError(
                f"{part.source}: nothing to evaluate, none of {len(part.identities):,} images has an identity (empty "
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


def _labels(part: FeatureSet) -> Labels:
    return Labels(part.identities, part.cameras, part.times)
