"""The optimizer: which parameter learns how fast.

    model, prompt tokens -> [parameter_groups -> adam] -> engine

The engine gives a group schedules.stage1_lr or stage2_lr times its `lr_factor`.
"""

from collections.abc import Iterable
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

    Each group has `params`, `names`, `weight_decay` and `lr_factor`, by which the scheduled learning rate
    is multiplied: `lr_factor`, for biases times `bias_lr_factor`. Frozen parameters and empty groups are
    left out. The one-stage method adds the groups of its tokens, whose lr_factor is stage1.lr / stage2.lr.
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


def adam(groups: list[dict[str, Any]], fused: bool = False) -> torch.optim.Adam:
    """Adam with L2 decay, its learning rate 0 until a schedule sets it. fused: one kernel, on a GPU.

    Decay goes through the gradient (not AdamW), so every trained parameter moves at every step, also the tokens of
    identities that are not in the batch.
    """
    return torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=fused)
