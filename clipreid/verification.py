"""How often pairs of one identity are accepted where few pairs of two identities are: TPR at fixed FPR.

    sorted blocks of distances (ranking) -> [verification] -> "TPR@FPR" of the metrics

One distance is the limit for all queries. A positive is accepted at false positive rate f where at most
f x (number of negative pairs) negatives are at most as far. So each positive needs the number of negatives up to
it, as long as that is small: negatives are counted between the sorted positives, exactly, and those farther than
an estimate on the safe side are left out. Where it was not, `suffices` says so, and all have to be counted.

P = positive pairs of all queries
"""

from threading import Lock

import torch
from torch import Tensor

ONE_IN = {"1e-4": 10_000, "1e-3": 1000, "1e-2": 100}
"""Name of a false positive rate, and of how many negatives it lets one pass."""
SAFE_RATE = 0.03
"""Fraction of the negatives in a sample below the estimate."""
STRIDE = 32
WAITING = 1 << 19  # distances that are counted at a time


class Verification:
    """Counts of all pairs between the distances of the positives."""

    def __init__(self, positives: Tensor, negatives: int, farthest: Tensor):
        """positives: float32 [P]; negatives: their number; farthest: nothing behind it is counted. All of all ranks."""
        ordered = positives.sort().values
        self.farthest = torch.minimum(farthest, ordered[-1])
        self.positives = ordered[ordered <= self.farthest]
        self.all_positives, self.negatives = len(positives), negatives
        self._counts = torch.zeros(len(self.positives) + 1, dtype=torch.int64, device=positives.device)
        self._waiting: list[Tensor] = []
        self._num_waiting = 0
        self._lock = Lock()

    def reach(self, squared: Tensor) -> Tensor:
        """Just beyond what has to be counted of each query, as |g|² - 2 q·g, float32 [b]; squared: |q|², [b]."""
        rounding = 4 * torch.finfo(squared.dtype).eps * (self.farthest.abs() + squared)
        return self.farthest - squared + rounding

    def add(self, ordered: Tensor, squared: Tensor) -> None:
        """A block of |g|² - 2 q·g, float32 [b, w], its rows ascending; squared: |q|², float32 [b]."""
        near = STRIDE * int((ordered[:, ::STRIDE] + squared[:, None] <= self.farthest).any(0).sum())
        distances = ordered[:, :near] + squared[:, None]
        distances = distances[distances <= self.farthest]
        with self._lock:
            self._waiting.append(distances)
            self._num_waiting += len(distances)
            if self._num_waiting > WAITING:
                self._count()

    def counts(self) -> Tensor:
        """Pairs at most as far as a positive and farther than the one before it. int64."""
        self._count()
        return self._counts

    def _count(self) -> None:
        if self._waiting:
            bins = torch.searchsorted(self.positives, torch.cat(self._waiting))
            self._counts += bins.bincount(minlength=len(self._counts))
            self._waiting, self._num_waiting = [], 0

    def suffices(self, counts: Tensor) -> bool:
        """Whether the counts of all ranks reach as far as any rate does."""
        counted = int(counts.sum()) - len(self.positives)
        return len(self.positives) == self.all_positives or counted > self.negatives // min(ONE_IN.values())

    def rates(self, counts: Tensor) -> dict[str, float]:
        """{"1e-4": …}, the fraction of the positives that is accepted, from the counts of all ranks."""
        upto = torch.searchsorted(self.positives, self.positives, right=True)
        negatives = counts.cumsum(0)[:-1] - upto
        accepted = {name: int((negatives <= self.negatives // one_in).sum()) for name, one_in in ONE_IN.items()}
        return {name: count / self.all_positives for name, count in accepted.items()}
