"""Parameter groups for Adam: which parameter learns how fast.

    ReIDModel -> [parameter_groups] -> torch.optim.Adam (L2 decay, not AdamW) -> engine
                 schedules -> [set_learning_rate], at the start of every epoch

Decay goes through the gradient (`torch.optim.Adam(weight_decay=…)`), so every trained parameter moves at
every step, also the tokens of identities that are not in the batch.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    bias_lr_factor: float = 1.0,
) -> list[dict]:
    """Groups of the trainable parameters: those without "bias" in their name and those with, in model order.

    Each group has `params`, `names`, `lr`, `base_lr` (what schedules scale: bias_lr_factor x lr for
    biases) and `weight_decay`. Frozen parameters and empty groups are left out.
    """
    groups = [
        {"params": [], "names": [], "lr": rate, "base_lr": rate, "weight_decay": weight_decay}
        for rate in (lr, lr * bias_lr_factor)
    ]
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            group = groups["bias" in name]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, schedule: Callable[[float], float]) -> None:
    """Give every group the learning rate that the schedule makes of its `base_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = schedule(group["base_lr"])
