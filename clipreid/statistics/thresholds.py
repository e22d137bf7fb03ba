"""The threshold at which a wanted share of trials is accepted, and how sure that is.

distances of trials that ought to be refused ──▶ [thresholds] ──▶ threshold; its interval, and that of the share
"""

from dataclasses import dataclass

import numpy as np

from clipreid.statistics.bootstrap import Estimate
from clipreid.statistics.proportions import proportion

ROUNDING = 1e-9
"""0.29 of 100 trials are 29 of them, and not what floating point makes of it."""


@dataclass(frozen=True)
class Threshold:
    """What is nearer is accepted."""

    wanted: float
    """The rate that it is to keep to."""
    distance: Estimate
    """With the distances at which as many of the trials are accepted as the ends of the rate's interval say (Woodruff
    1952, "Confidence intervals for medians and other position measures")."""
    rate: Estimate
    """The share of the trials that are accepted; at this threshold 95 of 100 such intervals hold that of new ones."""


def threshold_for(distances: np.ndarray, rate: float, clusters: np.ndarray) -> Threshold:
    """The largest distance below which at most this share of the trials lies. distances, clusters: [n]."""
    ordered = np.sort(distances)

    def at(share: float) -> float:
        place = int(share * len(ordered) + ROUNDING)
        return float(ordered[min(place, len(ordered) - 1)])

    found = at(rate)
    measured = proportion(distances < found, clusters)
    return Threshold(rate, Estimate(found, at(measured.low), at(measured.high)), measured)
