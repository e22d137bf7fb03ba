"""Which parameter learns how fast, and when.

    model, prompt tokens ──▶ [parameter_groups, adam] ──▶ engine ◀── [stage1_lr, stage2_lr] ◀── epoch

A group's learning rate is the stage's, which is a pure function of the epoch (1, 2, …), times its `lr_factor`: nothing
to save, nothing to step.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    bias_lr_factor: float = 1.0,
    lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters: those without "bias" in their name and those with, in model order.

    Each group has `params`, `names`, `weight_decay` and `lr_factor`, by which the scheduled learning rate is
    multiplied: `lr_factor`, for biases times `bias_lr_factor`. Frozen parameters and empty groups are left out.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "names": [], "weight_decay": weight_decay, "lr_factor": factor}
        for factor in (lr_factor, lr_factor * bias_lr_factor)
    ]
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            group = groups["bias" in name]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups if group["params"]]


def adam(groups: list[dict[str, Any]]) -> torch.optim.Adam:
    """Adam with L2 decay, its learning rate 0 until a schedule sets it; in one pass over memory, on every device.

    Decay goes through the gradient (not AdamW), so every trained parameter moves at every step, also the tokens of
    identities that are not in the batch.
    """
    return torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def stage1_lr(
    epoch: int,
    epochs: int,
    lr: float,
    warmup_epochs: int,
    warmup_lr: float,
    min_lr: float,
) -> float:
    """Linear from warmup_lr (at 0) towards lr (at warmup_epochs), then the cosine from lr (at 0) to min_lr (at epochs).

    The cosine's clock starts at 0 and not after the warm-up, so `lr` itself is never reached.
    """
    if epoch < warmup_epochs:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup_epochs
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs))


def stage2_lr(
    epoch: int,
    lr: float,
    milestones: Sequence[int],
    warmup_epochs: int,
    warmup_factor: float,
    gamma: float,
) -> float:
    """Linear warm-up from warmup_factor to 1, times gamma for every milestone reached; the two multiply."""
    warmup = warmup_factor + (1 - warmup_factor) * epoch / warmup_epochs if epoch < warmup_epochs else 1.0
    reached = sum(milestone <= epoch for milestone in milestones)
    return lr * warmup * gamma**reached
