"""How sure a mean over queries is, and a difference of two: the bootstrap over identities.

    per-query figures of one or more runs ──▶ [bootstrap] ──▶ intervals; how often a difference keeps its sign

Queries of one identity rise and fall together, so identities are drawn, each with all of its queries. The draws are
the same for all that is compared (paired): what makes an identity hard for every run cancels in a difference.

Q = queries, I = identities, B = resamples, F = figures
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

LEVEL = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """One figure less another."""

    same_sign: float
    """Share of the resamples in which it has the sign that it has here."""


class IdentityBootstrap:
    """Resamples of the identities of Q queries, for figures that are means over queries."""

    def __init__(self, identities: np.ndarray, resamples: int, seed: int) -> None:
        """identities: [Q]. The same identities, resamples and seed give the same draws."""
        self.names, self._codes = np.unique(identities, return_inverse=True)
        self.resamples, self.seed = resamples, seed

    @property
    def num_identities(self) -> int:
        return len(self.names)

    @cached_property
    def _weights(self) -> np.ndarray:
        """How often each identity is in each resample. float64 [B, I]."""
        count = self.num_identities
        draws = np.random.default_rng(self.seed).multinomial(count, np.full(count, 1 / count), size=self.resamples)
        return draws.astype(np.float64)

    def means(self, values: np.ndarray) -> np.ndarray:
        """The means of each resample. values: float [Q, F] -> float64 [B, F]."""
        sums = np.stack([np.bincount(self._codes, column) for column in values.T], axis=1)
        queries = np.bincount(self._codes)
        means: np.ndarray = (self._weights @ sums) / (self._weights @ queries)[:, None]
        return means

    def estimates(self, values: np.ndarray) -> list[Estimate]:
        """The means over all queries of values, float [Q, F], with their intervals."""
        low, high = self._interval(self.means(values))
        return [Estimate(*map(float, each)) for each in zip(values.mean(0), low, high, strict=True)]

    def differences(self, values: np.ndarray, others: np.ndarray) -> list[Difference]:
        """The means of values less those of others, both float [Q, F] of the same queries, with their intervals."""
        drawn = self.means(values) - self.means(others)
        found = values.mean(0) - others.mean(0)
        same = (np.sign(drawn) == np.sign(found)).mean(0)
        return [Difference(*map(float, each)) for each in zip(found, *self._interval(drawn), same, strict=True)]

    def _interval(self, drawn: np.ndarray) -> np.ndarray:
        """The ends of the intervals of figures of resamples, float64 [B, F] -> [2, F].

        Percentiles, expanded as Hesterberg (2015, "What teachers should know about the bootstrap", section 3.3) does:
        with few identities the plain ones are too narrow, by the factor between Student's and the normal quantile and
        by the missing -1 in the variance. One identity says nothing of how identities differ: NaN.
        """
        from scipy.stats import norm, t  # Here: what trains loads no scipy.

        count = self.num_identities
        if count < 2:
            return np.full((2, drawn.shape[1]), np.nan)
        tail = norm.cdf(np.sqrt(count / (count - 1)) * t.ppf((1 - LEVEL) / 2, count - 1))
        ends: np.ndarray = np.quantile(drawn, [tail, 1 - tail], axis=0)
        return ends
