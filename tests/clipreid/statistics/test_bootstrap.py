"""Intervals over identities: right as often as they say, paired, and the same for the same seed."""

import numpy as np
import pytest

from clipreid.statistics.bootstrap import IdentityBootstrap


def simulated(draw, identities, difference):
    """AP-like figures of two runs, [Q, 1] each: identities and queries differ, and so does what a run makes of them."""
    queries = draw.integers(1, 9, identities)
    owner = np.repeat(np.arange(identities), queries)
    hard, gained = draw.beta(4, 2, identities), draw.normal(difference, 0.1, identities)
    one = hard[owner] + draw.normal(0, 0.1, len(owner))
    other = hard[owner] + gained[owner] + draw.normal(0, 0.1, len(owner))
    return owner, one[:, None], other[:, None]


@pytest.mark.parametrize("identities", [20, 60])
def test_intervals_cover_the_truth_in_93_to_97_percent_of_1000_comparisons(identities):
    draw, truth, covered = np.random.default_rng(0), 0.02, 0
    for seed in range(1000):
        owner, one, other = simulated(draw, identities, truth)
        (found,) = IdentityBootstrap(owner, 500, seed).differences(other, one)
        covered += found.low <= truth <= found.high
    assert 930 <= covered <= 970


def test_queries_taken_one_by_one_would_cover_the_truth_far_too_seldom():
    """Why identities are drawn, and that the simulation can tell."""
    draw, truth, covered = np.random.default_rng(0), 0.02, 0
    for seed in range(100):
        owner, one, other = simulated(draw, 40, truth)
        (found,) = IdentityBootstrap(np.arange(len(owner)), 300, seed).differences(other, one)
        covered += found.low <= truth <= found.high
    assert covered < 90


def test_resampled_means_are_those_of_the_drawn_identities_queries():
    owner, values = np.array(["b", "a", "b", "c", "a", "b"]), np.arange(12.0).reshape(6, 2)
    bootstrap = IdentityBootstrap(owner, 50, seed=3)
    for drawn, means in zip(bootstrap._weights.astype(int), bootstrap.means(values), strict=True):
        chosen = [name for name, times in zip(bootstrap.names, drawn, strict=True) for _ in range(times)]
        rows = [row for name in chosen for row in np.flatnonzero(owner == name)]
        np.testing.assert_allclose(means, values[rows].mean(0))


def test_a_difference_is_paired_and_keeps_its_sign_where_every_identity_gains():
    draw = np.random.default_rng(0)
    owner, values = np.repeat(np.arange(30), 4), draw.uniform(size=(120, 1))
    (alone,) = IdentityBootstrap(owner, 500, 0).estimates(values)
    (gain,) = IdentityBootstrap(owner, 500, 0).differences(values + 0.01, values)
    assert alone.high - alone.low > 0.05
    assert gain.low == pytest.approx(0.01) and gain.high == pytest.approx(0.01) and gain.same_sign == 1


def test_the_share_of_the_sign_is_that_of_the_resamples():
    draw = np.random.default_rng(1)
    owner, one, other = simulated(draw, 40, 0.01)
    bootstrap = IdentityBootstrap(owner, 400, 7)
    (found,) = bootstrap.differences(other, one)
    drawn = bootstrap.means(other) - bootstrap.means(one)
    assert found.same_sign == np.mean(drawn > 0 if found.value > 0 else drawn < 0)
    assert 0.5 < found.same_sign < 1


def test_the_seed_fixes_the_interval():
    owner, one, other = simulated(np.random.default_rng(2), 40, 0.01)
    first, again, another = (IdentityBootstrap(owner, 200, seed).differences(other, one) for seed in (1, 1, 2))
    assert first == again != another


def test_one_identity_has_no_interval():
    (found,) = IdentityBootstrap(np.array(["a", "a"]), 100, 0).estimates(np.array([[0.2], [0.6]]))
    assert found.value == pytest.approx(0.4) and np.isnan([found.low, found.high]).all()
