"""How sure a proportion is where what was counted comes in clusters, such as the queries of an identity.

    hits of n trials in I clusters ──▶ [proportions] ──▶ interval

Clopper and Pearson's exact interval, for as many independent trials as the clustered ones are worth (Korn and
Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts estimated from
survey data"). Its ends are also those of a threshold that was taken from the trials themselves, as a quantile of them:
the share of new trials beyond an order statistic follows the beta distribution of the same parameters (Vovk 2012,
"Conditional validity of inductive conformal predictors").
"""

import numpy as np

from clipreid.statistics.bootstrap import LEVEL, Estimate

TAIL = (1 - LEVEL) / 2


def proportion(hits: np.ndarray, clusters: np.ndarray) -> Estimate:
    """The share of hits, bool [n], with its interval of 95 % over clusters, [n]. One cluster: [0, 1]."""
    from scipy.stats import beta

    share, trials = float(hits.mean()), effective_trials(hits, clusters)
    count = share * trials
    low = beta.ppf(TAIL, count, trials - count + 1) if share > 0 and trials else 0.0
    high = beta.ppf(1 - TAIL, count + 1, trials - count) if share < 1 and trials else 1.0
    return Estimate(share, float(low), float(high))


def effective_trials(hits: np.ndarray, clusters: np.ndarray) -> float:
    """How many independent trials are worth as much, at most n, with the few degrees of freedom of few clusters.

    Where all or none hit nothing is seen of how clusters differ: each counts for one trial. One cluster: 0.
    """
    from scipy.stats import t

    _, codes = np.unique(clusters, return_inverse=True)
    groups, total, share = int(codes.max()) + 1, len(hits), float(hits.mean())
    if groups < 2:
        return 0.0
    if share in (0.0, 1.0):
        return float(groups)
    deviations = np.bincount(codes, hits - share)
    variance = groups / (groups - 1) * float(np.square(deviations).sum()) / total**2
    worth = share * (1 - share) / variance if variance else float(total)
    few = float(t.ppf(TAIL, total - 1) / t.ppf(TAIL, groups - 1)) ** 2
    return min(worth * few, float(total))
