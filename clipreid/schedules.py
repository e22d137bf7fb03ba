"""Learning rates of both stages as pure functions of the epoch (1, 2, …); nothing to save, nothing to step.

config -> [schedules] -> the engine's learning rate, times each group's lr_factor
"""

import math
from collections.abc import Sequence


def stage1_lr(
    epoch: int,
    epochs: int,
    lr: float = 3.5e-4,
    warmup_epochs: int = 5,
    warmup_lr: float = 1e-5,
    min_lr: float = 1e-6,
) -> float:
    """Linear from warmup_lr (at 0) towards lr (at warmup_epochs), then the cosine from lr (at 0) to
    min_lr (at epochs).

    The cosine's clock starts at 0 and not after the warm-up, so `lr` itself is never reached (METHOD §3).
    """
    if epoch < warmup_epochs:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup_epochs
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs))


def stage2_lr(
    epoch: int,
    lr: float,
    milestones: Sequence[int],
    warmup_epochs: int = 10,
    warmup_factor: float = 0.1,
    gamma: float = 0.1,
) -> float:
    """Linear warm-up from warmup_factor to 1, times gamma for every milestone reached; the two multiply
    (METHOD §5)."""
    warmup = warmup_factor + (1 - warmup_factor) * epoch / warmup_epochs if epoch < warmup_epochs else 1.0
    return lr * warmup * gamma ** sum(milestone <= epoch for milestone in milestones)
