"""Measures of how far a sample is from a distribution."""

import numpy as np


def ks_distance(sample, cdf):
    """Largest distance between an empirical and a given distribution function."""
    values = np.sort(np.asarray(sample, dtype=np.float64))
    at, n = cdf(values), len(values)
    return max(np.abs(at - np.arange(1, n + 1) / n).max(), np.abs(at - np.arange(n) / n).max())
