"""Copies to a GPU that no host waits for.

loaders, labels, row numbers ──▶ [to_device] ──▶ a step on the device
"""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, copied in the order of the device's work. From ordinary memory, or without being told
    so, the host would wait until the device has done all that was queued: it goes by way of page-locked memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
