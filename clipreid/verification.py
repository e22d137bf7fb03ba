"""How often pairs of one identity are accepted where few pairs of two identities are: TPR at fixed FPR.

    blocks of distances (products) -> [verification] -> "TPR@FPR" of the metrics

One distance is the limit for all queries. A positive is accepted at false positive rate f where at most
f x (number of negative pairs) negatives are at most as far. So each positive needs the number of negatives up to
it, as long as that is small: negatives are counted between the sorted positives, exactly, and those farther than
an estimate on the safe side are left out. Where it was not, `suffices` says so, and all have to be counted.

P = positive pairs of all queries
"""

from threading import Lock

import torch
from torch import Tensor

from clipreid.ranking import ascending, within_reach

ONE_IN = {"1e-4": 10_000, "1e-3": 1000, "1e-2": 100}
"""Name of a false positive rate, and of how many negatives it lets one pass."""
SAFE_RATE = 0.03
"""Fraction of the negatives in a sample below the estimate."""
WAITING = 1 << 20  # distances that are counted at a time


class Verification:
    """How many pairs of all are at most as far as each positive."""

    def __init__(self, positives: Tensor, negatives: int, farthest: Tensor):
        """positives: float32 [P]; negatives: their number; farthest: nothing behind it is counted. All of all ranks."""
        ordered = ascending(positives)
        self.farthest = torch.minimum(farthest, ordered[-1])
        self.positives = ordered[ordered <= self.farthest]
        self.all_positives, self.negatives = len(positives), negatives
        self._upto = torch.zeros(len(self.positives) + 1, dtype=torch.int64, device=positives.device)
        self._waiting: list[Tensor] = []
        self._num_waiting = 0
        self._lock = Lock()

    def add(self, distances: Tensor, squared: Tensor) -> None:
        """A block of |g|² - 2 q·g, float32 [b, w], infinite where it does not count; squared: |q|², float32 [b]."""
        rounding = 4 * torch.finfo(squared.dtype).eps * (self.farthest.abs() + squared)
        near = within_reach(distances, self.farthest - squared + rounding)
        values = distances.flatten()[near] + squared[near // distances.shape[1]]
        values = values[values <= self.farthest]
        with self._lock:
            self._waiting.append(values)
            self._num_waiting += len(values)
            if self._num_waiting > WAITING:
                self._count()

    def counts(self) -> Tensor:
        """Of what was added, how many are at most as far as each of `positives`, and last how many in all. int64."""
        self._count()
        return self._upto

    def _count(self) -> None:
        if self._waiting:
            limits = torch.cat([self.positives, self.farthest[None]])
            self._upto += torch.searchsorted(ascending(torch.cat(self._waiting)), limits, right=True)
            self._waiting, self._num_waiting = [], 0

    def suffices(self, counts: Tensor) -> bool:
        """Whether the counts of all ranks reach as far as any rate does."""
        negatives = int(counts[-1]) - len(self.positives)
        return len(self.positives) == self.all_positives or negatives > self.negatives // min(ONE_IN.values())

    def rates(self, counts: Tensor) -> dict[str, float]:
        """{"1e-4": …}, the fraction of the positives that is accepted, from the counts of all ranks."""
        negatives = counts[:-1] - torch.searchsorted(self.positives, self.positives, right=True)
        accepted = {name: int((negatives <= self.negatives // one_in).sum()) for name, one_in in ONE_IN.items()}
        return {name: count / self.all_positives for name, count in accepted.items()}
