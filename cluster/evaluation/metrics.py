"""From descriptors or feature files to metrics, on many workers.

    evaluate, feature files ── descriptors ──▶ [measure] ──▶ metrics

The distances are counted by `clipreid.retrieval`; here the counts of the ranks are added up. No encoder is needed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from clipreid.errors import ModelError
from clipreid.retrieval.metrics import Labels, retrieve
from clipreid.retrieval.rerank import evaluate_reranked
from clipreid.retrieval.vehicleid import vehicleid
from cluster.evaluation.feature_file import FeatureSet
from cluster.evaluation.features import Progress, no_progress
from cluster.evaluation.per_query import PerQueryFile
from cluster.ranks.team import Team

UNIT_TOLERANCE = 1e-6
"""How far the length of a row that was normalised in float32 may be from 1."""
BLOCK_ROWS = 8192
Show = Callable[[str], AbstractContextManager[Progress]]
"""show(what is done): a block in which progress can be told."""


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
def silent(doing: str) -> Iterator[Progress]:
    """Shows nobody anything."""
    yield no_progress


def measure_retrieval(
    query_features: np.ndarray,
    query: Labels,
    gallery_features: np.ndarray | Rows,
    gallery: Labels,
    *,
    rule: str,
    rerank: tuple[int, int, float] | None,
    team: Team,
    show: Show = silent,
    per_query: PerQueryFile | None = None,
    keys: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> dict[str, Any]:
    """mAP, mINP, R1, …, and with `rerank` (k1, k2, lambda) the same of the re-ranked distances under "rerank".

    Features float32 [n, D], the same on every rank; the gallery's may be memory-mapped. per_query: written by the
    first rank, with the keys of queries and gallery; of the plain distances.
    """
    show = show if team.is_first else silent
    on_device = torch.from_numpy(query_features).to(team.device)
    with show("compare with the gallery") as progress:
        result = retrieve(
            on_device, query, gallery_features, gallery, rule=rule, top_k=per_query.top_k if per_query else 0,
            part=(team.rank, team.world_size), reduce_sum=_summed_by(team), on_gallery=progress,
        )  # fmt: skip
    if per_query and team.is_first:
        per_query.write(result, *keys)
    metrics = result.metrics()
    if rerank:
        k1, k2, weight = rerank
        with show("re-rank") as progress:
            metrics["rerank"] = evaluate_reranked(
                on_device, query, gallery_features, gallery, rule=rule, k1=k1, k2=k2, lam=weight,
                part=(team.rank, team.world_size), reduce_sum=_summed_by(team), on_images=progress,
            )  # fmt: skip
    return metrics


def measure_vehicleid(
    features: np.ndarray, identities: np.ndarray, lists: np.ndarray, *, draws: int, seed: int, team: Team
) -> dict[str, Any]:
    """`small`, `medium`, `large`, each with mean and std over the draws. Features float32 [n, D] of split test."""
    return vehicleid(
        torch.from_numpy(features).to(team.device), identities, lists, draws=draws, seed=seed,
        part=(team.rank, team.world_size), reduce_sum=_summed_by(team),
    )  # fmt: skip


def measure_pair(
    query: FeatureSet,
    gallery: FeatureSet,
    *,
    normalize: bool,
    rule: str,
    rerank: tuple[int, int, float] | None,
    team: Team,
    show: Show = silent,
    per_query: PerQueryFile | None = None,
) -> dict[str, Any]:
    """Metrics of feature files, the same on every rank. normalize: features are scaled to length 1.

    Raises ModelError for features that are not finite, and where no query has a valid match.
    """
    return measure_retrieval(
        Rows(query, normalize)[:], _labels(query), Rows(gallery, normalize), _labels(gallery),
        rule=rule, rerank=rerank, team=team, show=show, per_query=per_query,
        keys=(query.keys, gallery.keys),
    )  # fmt: skip


def measure_test(test: FeatureSet, *, normalize: bool, draws: int, seed: int, team: Team) -> dict[str, Any]:
    """The VehicleID protocol on a feature file. Raises as `measure_pair`, and where no image is in a test list."""
    features = Rows(test, normalize)[:]
    return measure_vehicleid(features, test.identities, test.lists, draws=draws, seed=seed, team=team)


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


def _summed_by(team: Team) -> Callable[[Tensor], Tensor]:
    return lambda tensor: team.patient_all_reduce_sum(tensor.to(team.device), "merge evaluation").to(tensor.device)
