"""How often pairs of one identity are accepted where few pairs of two identities are: TPR at fixed FPR.

    distance_blocks ──▶ [tpr_at_fpr] ──▶ "TPR@FPR" of the metrics

One distance is the limit for all queries. A positive is accepted at false positive rate f where at most f x (number of
negative pairs) negatives are at most as far. So each positive needs the number of negatives up to it, as long as that
is small: negatives are counted between the sorted positives, exactly, and those farther than an estimate on the safe
side are left out. Where it was not, `suffices` says so, and all have to be counted. (fast-reid's figure of that name
takes pairs of two identities as the positives.)

P = positive pairs of all queries
"""

from threading import Lock

import torch
from torch import Tensor

from clipreid.retrieval.positives import Near, ascending

ONE_IN = {"1e-4": 10_000, "1e-3": 1000, "1e-2": 100}
"""Name of a false positive rate, and of how many negatives it lets one pass."""
SAFE_RATE = 0.015
"""Fraction of the negatives in a sample below the estimate: half as many again as any rate asks for."""
WAITING = 1 << 20  # distances that are counted at a time


class Verification:
    """How many pairs of all are at most as far as each positive."""

    def __init__(self, positives: Tensor, negatives: int, farthest: Tensor) -> None:
        """positives: float32 [P]; negatives: their number; farthest: nothing behind it is counted. All of all ranks."""
        ordered = ascending(positives)
        self.farthest = torch.minimum(farthest, ordered[-1])
        self.positives = ordered[ordered <= self.farthest]
        self.all_positives, self.negatives = len(positives), negatives
        self._upto = torch.zeros(len(self.positives) + 1, dtype=torch.int64, device=positives.device)
        self._waiting: list[Tensor] = []
        self._num_waiting = 0
        self._lock = Lock()

    def reach(self, squared: Tensor) -> Tensor:
        """Below it lie all |g|² - 2 q·g that can matter, float32 [b]; squared: |q|², float32 [b]."""
        return self.farthest - squared + 4 * torch.finfo(squared.dtype).eps * (self.farthest.abs() + squared)

    def add(self, near: Near, squared: Tensor) -> None:
        """Those |g|² - 2 q·g of a block that are below `reach`, and perhaps more, infinite where it does not count."""
        values = near.distance + squared.index_select(0, near.row)
        values = values[values <= self.farthest]
        with self._lock:
            self._waiting.append(values)
            self._num_waiting += len(values)
            waiting = self._take_waiting() if self._num_waiting > WAITING else []
        self._count(waiting)  # Other threads go on meanwhile.

    def counts(self) -> Tensor:
        """Of what was added, how many are at most as far as each of `positives`, and last how many in all. int64."""
        self._count(self._take_waiting())
        return self._upto

    def _take_waiting(self) -> list[Tensor]:
        waiting, self._waiting, self._num_waiting = self._waiting, [], 0
        return waiting

    def _count(self, waiting: list[Tensor]) -> None:
        if waiting:
            limits = torch.cat([self.positives, self.farthest[None]])
            upto = torch.searchsorted(ascending(torch.cat(waiting)), limits, right=True)
            with self._lock:
                self._upto += upto

    def suffices(self, counts: Tensor) -> bool:
        """Whether the counts of all ranks reach as far as any rate does."""
        negatives = int(counts[-1]) - len(self.positives)
        return len(self.positives) == self.all_positives or negatives > self.negatives // min(ONE_IN.values())

    def rates(self, counts: Tensor) -> dict[str, float]:
        """{"1e-4": …}, the fraction of the positives that is accepted, from the counts of all ranks."""
        negatives = counts[:-1] - torch.searchsorted(self.positives, self.positives, right=True)
        accepted = {name: int((negatives <= self.negatives // one_in).sum()) for name, one_in in ONE_IN.items()}
        return {name: count / self.all_positives for name, count in accepted.items()}
