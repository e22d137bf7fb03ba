"""Thresholds keep to their rate, and to its interval on identities that they were not taken from."""

import numpy as np
import pytest
from scipy.stats import beta, norm

from clipreid.statistics.proportions import effective_trials, proportion
from clipreid.statistics.thresholds import threshold_for

BETWEEN, WITHIN = 0.1, 0.1
"""Standard deviations of the distance of the nearest stranger: of identities, and of an identity's queries."""


def true_rate(distance):
    """The share of all searches of all identities that there are."""
    return norm.cdf((distance - 1) / np.hypot(BETWEEN, WITHIN))


def simulated(draw, identities):
    """Distances of the searches of so many identities, and whose they are."""
    owner = np.repeat(np.arange(identities), draw.integers(1, 9, identities))
    return 1 + draw.normal(0, BETWEEN, identities)[owner] + draw.normal(0, WITHIN, len(owner)), owner


@pytest.mark.parametrize(("identities", "rate"), [(100, 0.01), (300, 0.01), (50, 0.1)])
def test_a_threshold_keeps_to_its_interval_on_new_identities(identities, rate):
    """In at least 93 % of 1,000 simulations; the interval is an exact one, so it may be wider than it need be."""
    draw, kept, wide = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        found = threshold_for(*_ordered(simulated(draw, identities), rate))
        kept += found.rate.low <= true_rate(found.distance.value) <= found.rate.high
        wide += found.rate.high > 0.5
    assert kept >= 930 and not wide


def _ordered(searches, rate):
    distances, owner = searches
    return distances, rate, owner


def test_the_threshold_itself_lies_in_its_interval_as_often():
    draw, kept, truth = np.random.default_rng(1), 0, 1 + np.hypot(BETWEEN, WITHIN) * norm.ppf(0.1)
    for _ in range(400):
        found = threshold_for(*_ordered(simulated(draw, 100), 0.1))
        kept += found.distance.low <= truth <= found.distance.high
    assert kept >= 0.93 * 400


def test_searches_taken_one_by_one_would_keep_to_it_far_too_seldom():
    """Why identities are what is counted, and that the simulation can tell."""
    draw, kept = np.random.default_rng(0), 0
    for _ in range(300):
        distances, owner = simulated(draw, 50)
        found = threshold_for(np.repeat(distances, 4), 0.1, np.arange(4 * len(owner)))
        kept += found.rate.low <= true_rate(found.distance.value) <= found.rate.high
    assert kept < 0.8 * 300


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.25])
def test_at_most_the_wanted_share_is_accepted_and_no_larger_threshold_does_that(rate):
    distances = np.random.default_rng(0).permutation(np.arange(40.0).repeat(2))  # with ties
    found = threshold_for(distances, rate, np.arange(80))
    assert np.mean(distances < found.distance.value) == found.rate.value <= rate
    assert np.mean(distances <= found.distance.value) > rate


def test_independent_trials_get_clopper_and_pearsons_interval():
    hits = np.arange(200) < 7
    found = proportion(hits, np.arange(200))
    trials = effective_trials(hits, np.arange(200))
    assert trials == pytest.approx(200, rel=0.01)
    assert found.low == pytest.approx(beta.ppf(0.025, 7, 194), rel=0.02)
    assert found.high == pytest.approx(beta.ppf(0.975, 8, 193), rel=0.02)


def test_an_identity_repeated_is_worth_no_more():
    hits, owner = np.arange(60) % 5 == 0, np.arange(60)
    once, often = effective_trials(hits, owner), effective_trials(np.repeat(hits, 9), np.repeat(owner, 9))
    assert often == pytest.approx(once, rel=0.05)


def test_no_hits_of_few_identities_are_no_proof():
    found = proportion(np.zeros(100, bool), np.repeat(np.arange(10), 10))
    assert found.value == found.low == 0 and found.high == pytest.approx(1 - 0.025**0.1)
    assert proportion(np.ones(5, bool), np.zeros(5)).low == 0


def test_a_share_that_floating_point_rounds_down_is_taken_whole():
    assert 0.29 * 100 < 29
    assert threshold_for(np.arange(100.0), 0.29, np.arange(100)).rate.value == 0.29
