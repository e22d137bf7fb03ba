"""From a distance to the probability that two pictures are of one identity, and how far that can be trusted.

    counts of pairs by distance, same and different ──▶ [calibration] ──▶ P(same | distance); its error on others

A logistic curve (Platt 1999, "Probabilistic outputs for support vector machines", with his targets, which keep it
finite where the classes do not overlap). Pairs of the same identity count as much as pairs of different ones: the curve
says what the two pictures say. Where one expects a pair to match with probability p, log(p / (1 - p)) is added to
`intercept` (Brümmer and du Preez 2006, "Application-independent evaluation of speaker detection").

K = steps of distance
"""

from dataclasses import dataclass

import numpy as np

GROUPS = 10
"""Of equal weight, whose mean probabilities are compared with what they turn out to be."""


@dataclass(frozen=True)
class Curve:
    """P(same) = 1 / (1 + exp(-(intercept + slope * distance)))."""

    intercept: float
    slope: float

    def probability(self, distances: np.ndarray) -> np.ndarray:
        from scipy.special import expit

        found: np.ndarray = expit(self.intercept + self.slope * np.asarray(distances))
        return found


def fit_curve(distances: np.ndarray, same: np.ndarray, different: np.ndarray) -> Curve:
    """distances: [K]; same, different: how many pairs there are at each, [K], some of both."""
    from scipy.optimize import minimize
    from scipy.special import expit

    numbers = np.array([same.sum(), different.sum()])
    weights = np.concatenate([same / numbers[0], different / numbers[1]]) / 2
    targets = np.repeat([(numbers[0] + 1) / (numbers[0] + 2), 1 / (numbers[1] + 2)], len(distances))
    centre = weights @ np.tile(distances, 2)
    spread = np.sqrt(weights @ np.square(np.tile(distances, 2) - centre)) or 1.0
    steps = (np.tile(distances, 2) - centre) / spread

    def loss(curve: np.ndarray) -> tuple[float, np.ndarray]:
        logits = curve[0] + curve[1] * steps
        slopes = weights * (expit(logits) - targets)
        return float(weights @ (np.logaddexp(0, logits) - targets * logits)), np.array([slopes.sum(), slopes @ steps])

    intercept, slope = minimize(loss, np.zeros(2), jac=True, method="BFGS").x
    return Curve(float(intercept - slope * centre / spread), float(slope / spread))


def calibration_error(curve: Curve, distances: np.ndarray, same: np.ndarray, different: np.ndarray) -> float:
    """Expected calibration error: how far the probabilities are from the share of pairs that are the same, on average
    over groups of pairs of like probability (Naeini et al. 2015), same and different weighing alike. As `fit_curve`."""
    order = np.argsort(distances, kind="stable")
    same, different = (counts[order] / counts.sum() / 2 for counts in (same, different))
    weights = same + different
    groups = np.minimum((GROUPS * (weights.cumsum() - weights / 2)).astype(int), GROUPS - 1)
    expected = np.bincount(groups, weights * curve.probability(distances[order]), GROUPS)
    return float(np.abs(expected - np.bincount(groups, same, GROUPS)).sum())
