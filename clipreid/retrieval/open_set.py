"""Searches for who may not be there: how often a stranger is taken for somebody, and somebody missed.

    descriptors of queries and gallery ──▶ metrics.retrieve ──▶ [open_set] ──▶ FNIR at FPIR, threshold, probability

A drawn half of the identities is taken out of the gallery. As ISO/IEC 19795-1 and NIST's FRVT define them:

    FPIR   of the queries whose identity is not in the gallery (non-mated searches), the share that has a gallery image
           nearer than the threshold
    FNIR   of the queries with a match (mated searches), the share whose nearest image is of another identity or not
           nearer than the threshold (candidate lists of length 1)

A query whose matches the rule takes out, or of unknown identity, is neither; images of unknown identity are taken out
of the gallery, as they may be anybody's.

Q, G = query and gallery images
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipreid.errors import ModelError
from clipreid.peers import ALONE, Peers
from clipreid.retrieval.distance_blocks import DistanceBlocks, FeatureRows
from clipreid.retrieval.metrics import retrieve
from clipreid.retrieval.pair_counts import PairCounts, count_pairs
from clipreid.retrieval.positives import Labels
from clipreid.retrieval.progress import Progress, unreported
from clipreid.retrieval.rules import Rule
from clipreid.statistics.bootstrap import Estimate
from clipreid.statistics.calibration import Curve, calibration_error, fit_curve
from clipreid.statistics.proportions import proportion
from clipreid.statistics.thresholds import Threshold, threshold_for

RATES = (0.1, 0.01)
GALLERY_PARTS = (8, 4, 2, 1)
"""The gallery holds one in so many of the identities that are left in it."""
ENOUGH_IDENTITIES = 20
"""In each half, for a camera to have a curve of its own."""


@dataclass(frozen=True)
class Searches:
    """What came of all searches in one gallery."""

    identities: int
    images: int
    """Of the gallery."""
    mated: np.ndarray
    """float32 [n], the distance of the nearest image; infinite where it is of another identity."""
    mated_identities: np.ndarray
    non_mated: np.ndarray
    """float32 [m], the distance of the nearest image."""
    non_mated_identities: np.ndarray

    def threshold(self, rate: float) -> Threshold:
        """That keeps to this FPIR."""
        return threshold_for(self.non_mated, rate, self.non_mated_identities)

    def fnir(self, threshold: Threshold) -> Estimate:
        return proportion(~(self.mated < threshold.distance.value), self.mated_identities)

    def metrics(self) -> dict[str, Any]:
        """The size of the gallery, and FNIR where FPIR is at most each of the rates."""
        counts = {"identities": self.identities, "images": self.images}
        return counts | {"FNIR@FPIR": {f"{rate:g}": asdict(self.fnir(self.threshold(rate))) for rate in RATES}}


@dataclass(frozen=True)
class SameIdentity:
    """The probability that two pictures are of one identity, by their distance."""

    curve: Curve
    error: float
    """Expected calibration error on the pairs of identities that the curve was not fitted to."""
    identities: int
    """That it was fitted to."""

    def metrics(self) -> dict[str, Any]:
        return asdict(self.curve) | {"calibration_error": self.error, "identities": self.identities}


@dataclass(frozen=True)
class OpenSet:
    """What an open-set evaluation has found."""

    by_gallery: list[Searches]
    """In growing galleries, the last of which is the whole."""
    wanted: float
    """The FPIR that the threshold is for."""
    same_identity: SameIdentity | None
    """None where there are no pairs of both kinds in both halves."""
    by_camera: dict[int, SameIdentity]
    """Of the queries' cameras that have enough identities."""

    def metrics(self) -> dict[str, Any]:
        """The figures under the names of metrics.json; distances are Euclidean."""
        whole = self.by_gallery[-1]
        counts = {"mated_searches": len(whole.mated), "non_mated_searches": len(whole.non_mated)}
        return {
            **whole.metrics(),
            **counts,
            "by_gallery": [searches.metrics() for searches in self.by_gallery],
            **self.decision(),
        }

    def decision(self) -> dict[str, Any]:
        """What whoever uses the model has to know to decide by distances."""
        whole = self.by_gallery[-1]
        threshold = whole.threshold(self.wanted)
        found = asdict(threshold) | {"FNIR": asdict(whole.fnir(threshold))}
        found["FPIR"] = found.pop("rate")
        if self.same_identity is None:
            return {"threshold": found}
        cameras = {str(camera): each.metrics() for camera, each in self.by_camera.items()}
        return {"threshold": found, "same_identity": self.same_identity.metrics() | {"by_camera": cameras}}


def open_set(
    query_features: Tensor,
    query: Labels,
    gallery_features: Tensor | FeatureRows,
    gallery: Labels,
    *,
    rule: Rule,
    rate: float,
    seed: int,
    peers: Peers = ALONE,
    progress: Progress = unreported,
) -> OpenSet:
    """Arguments as in `retrieve`. rate: the FPIR that a threshold is wanted for. seed: draws the identities.

    Raises ModelError as `retrieve`, and where fewer than two identities are in queries and gallery.
    """
    shared = np.intersect1d(query.identities[query.known], gallery.identities[gallery.known])
    if len(shared) < 2:
        raise ModelError(
            f"an open-set evaluation takes half of the identities out of the gallery, and {len(shared)} are in queries "
            "and gallery: give more images their identities"
        )
    drawn = np.random.default_rng(seed).permutation(shared)
    out, left = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    sets = query_features, query, gallery_features, gallery
    by_gallery = []
    for part in GALLERY_PARTS:
        absent = np.concatenate([out, left[-(-len(left) // part) :]])
        by_gallery.append(_search(*sets, rule, out, absent, peers))
    pairs = count_pairs(DistanceBlocks(*sets, rule, peers), out, progress)
    return OpenSet(
        by_gallery, rate, _calibrated(pairs.counts.sum(0), pairs, len(left)), dict(_by_camera(sets, pairs, out))
    )


def _search(
    query_features: Tensor,
    query: Labels,
    gallery_features: Tensor | FeatureRows,
    gallery: Labels,
    rule: Rule,
    strangers: np.ndarray,
    absent: np.ndarray,
    peers: Peers,
) -> Searches:
    """Of the gallery without the identities `absent`, of which only `strangers` are searched for."""
    in_gallery = np.flatnonzero(gallery.known & ~np.isin(gallery.identities, absent))
    rest = _some(gallery, in_gallery)
    of_strangers = np.isin(query.identities, strangers) | ~np.isin(query.identities, gallery.identities)
    asked = np.flatnonzero(query.known & (of_strangers | np.isin(query.identities, rest.identities)))
    queries = _some(query, asked)
    features = query_features[torch.from_numpy(asked).to(query_features.device)]
    found = retrieve(features, queries, Picked(gallery_features, in_gallery), rest, rule=rule, top_k=1, peers=peers)
    assert found.nearest is not None, "asked for by top_k"
    rows, distances = found.nearest.rows[:, 0], found.nearest.distances[:, 0]
    right = rest.identities[rows] == queries.identities
    mated, stranger = found.per_query.positives > 0, of_strangers[asked]
    return Searches(
        len(np.unique(rest.identities)),
        len(in_gallery),
        np.where(right, distances, np.inf)[mated],
        queries.identities[mated],
        distances[stranger],
        queries.identities[stranger],
    )


class Picked:
    """Some rows of features, read when they are asked for. float [n, D]."""

    def __init__(self, features: Tensor | FeatureRows, rows: np.ndarray) -> None:
        self.features, self.rows = features, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        chosen = self.rows[rows]
        if isinstance(self.features, Tensor):
            return self.features[torch.from_numpy(chosen).to(self.features.device)].cpu().numpy()
        return self.features[chosen]


def _some(labels: Labels, rows: np.ndarray) -> Labels:
    cameras, times = (None if column is None else column[rows] for column in (labels.cameras, labels.times))
    return Labels(labels.identities[rows], cameras, times)


def _calibrated(counts: np.ndarray, pairs: PairCounts, identities: int) -> SameIdentity | None:
    """Fitted to the first half and tested on the second. counts: int64 [2 halves, 2: different and same, K]."""
    if not counts.sum(2).all():
        return None
    (fit_different, fit_same), (different, same) = counts
    curve = fit_curve(pairs.distances, fit_same, fit_different)
    return SameIdentity(curve, calibration_error(curve, pairs.distances, same, different), identities)


def _by_camera(
    sets: tuple[Tensor, Labels, Tensor | FeatureRows, Labels], pairs: PairCounts, second_half: np.ndarray
) -> Iterator[tuple[int, SameIdentity]]:
    """The cameras under which enough identities of each half are searched for."""
    query = sets[1]
    for number, camera in enumerate(pairs.cameras.tolist()):
        if camera < 0 or query.cameras is None:
            continue
        seen = np.unique(query.identities[query.known & (query.cameras == camera)])
        in_second = int(np.isin(seen, second_half).sum())
        if min(in_second, len(seen) - in_second) >= ENOUGH_IDENTITIES:
            found = _calibrated(pairs.counts[number], pairs, len(seen) - in_second)
            if found:
                yield camera, found
