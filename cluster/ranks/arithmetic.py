"""In which numbers a worker computes, and what of it a device decides: `train.precision`, `train.compile`, TF32.

    train.precision, train.compile ── device, checkpoint ──▶ [arithmetic] ──▶ encoders, text tower

float32 is whole float32 on every device. Ampere and later GPUs round a product's factors to 10 bits where TF32 is
allowed: cuDNN's convolutions by torch's default, matrix products not. Neither here, `full_float32` is the one place.
The reason: both are switches of a whole process, so that what an encoder is allowed the losses, their gradients and the
distances of retrieval get too, and these lose the method's figures. What is to be fast takes bf16.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch

from cluster.ranks.team import Team
from cluster.settings.config import AUTO, Config, TrainSection

COMPILE_PAYS_FROM: tuple[int, int] | None = None
"""The least compute capability of GPUs on which `bench.py gpu` has shown that a compiled encoder pays for its
compilation within a run; None: it has not been measured on any, so `train.compile: auto` compiles nowhere."""


def full_float32() -> None:
    """No TF32 in this process, in convolutions as in matrix products. On a CPU there is none."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def has_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU that multiplies bf16 itself. A CPU is told to by name alone: what `auto` trains there
    is float32, bit for bit."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compiling_pays(device: torch.device) -> bool:
    """Where it has been measured that it does."""
    if device.type != "cuda" or COMPILE_PAYS_FROM is None:
        return False
    return torch.cuda.get_device_capability(device) >= COMPILE_PAYS_FROM


def encoder_autocast(train: TrainSection, device: torch.device) -> AbstractContextManager[Any]:
    """Around encoders and text tower, and nothing else: losses and retrieval are float32 whatever it says."""
    bf16 = has_bf16(device) if train.precision == AUTO else train.precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def settled(config: Config, team: Team, begun_with: str | None = None) -> Config:
    """The same settings with nothing left to the device, alike on all ranks.

    begun_with: the precision of the checkpoint that the run goes on from, or of the weights in use; None: of neither.
    """
    bf16, pays = (
        all(team.all_gather_objects(able(team.device), "compare devices")) for able in (has_bf16, compiling_pays)
    )
    chosen = {"precision": begun_with or ("bf16" if bf16 else "float32"), "compile": pays}
    left = {name: value for name, value in chosen.items() if getattr(config.train, name) == AUTO}
    return config.model_copy(update={"train": config.train.model_copy(update=left)})
