"""Probabilities from distances: the true ones where these are logistic, and an error that tells a wrong curve."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from clipreid.statistics.calibration import Curve, calibration_error, fit_curve

DISTANCES = np.linspace(0.005, 1.995, 200)
SAME, DIFFERENT = (norm.pdf(DISTANCES, mean, 0.2) for mean in (0.7, 1.1))
"""Two normal classes of one spread: the log-odds are a line through their middle, of slope -0.4 / 0.2²."""


def test_the_true_curve_is_found_and_has_no_error():
    curve = fit_curve(DISTANCES, 1e6 * SAME, 1e9 * DIFFERENT)
    assert curve.slope == pytest.approx(-10, rel=0.01) and curve.intercept == pytest.approx(9, rel=0.01)
    assert calibration_error(curve, DISTANCES, SAME, DIFFERENT) < 0.002
    assert curve.probability(np.array([0.9])) == pytest.approx(0.5, abs=0.01)


def test_the_error_is_the_mean_distance_from_what_pairs_turn_out_to_be():
    """By a plain loop over groups of pairs."""
    draw = np.random.default_rng(0)
    same, different = (np.bincount(draw.integers(0, 200, 400), minlength=200) for _ in range(2))
    curve = Curve(4.0, -4.0)
    pairs = [
        (d, kind, 1 / 800)
        for d, *n in zip(DISTANCES, same, different, strict=True)
        for kind in (0, 1)
        for _ in range(n[kind])
    ]
    groups, weight = [[] for _ in range(10)], 0.0
    for step in range(200):
        here = [pair for pair in pairs if pair[0] == DISTANCES[step]]
        mass = len(here) / 800
        groups[min(int(10 * (weight + mass / 2)), 9)] += here
        weight += mass
    plain = sum(abs(sum(w * (expit(4 - 4 * d) - (kind == 0)) for d, kind, w in group)) for group in groups if group)
    assert calibration_error(curve, DISTANCES, same, different) == pytest.approx(plain)


def test_a_curve_that_is_too_sure_has_an_error():
    curve = fit_curve(DISTANCES, SAME, DIFFERENT)
    surer = Curve(3 * curve.intercept, 3 * curve.slope)
    assert calibration_error(surer, DISTANCES, SAME, DIFFERENT) > 0.05


def test_classes_that_do_not_overlap_have_a_finite_curve():
    near = np.where(DISTANCES < 0.5, 10, 0)
    curve = fit_curve(DISTANCES, near, 10 - near)
    assert np.isfinite([curve.intercept, curve.slope]).all() and curve.slope < 0
    assert curve.probability(np.array([0.1, 1.9])) == pytest.approx([1, 0], abs=0.01)


def test_the_number_of_pairs_of_a_kind_does_not_matter():
    few, many = (fit_curve(DISTANCES, 1e5 * SAME, times * DIFFERENT) for times in (1e5, 1e8))
    assert few.slope == pytest.approx(many.slope, rel=1e-3)
