"""What a step copies to its device it copies without making the host wait: seen on a device that holds no data."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipreid import stage1
from clipreid.identity_table import IdentityTable
from clipreid.to_device import to_device


class Waits(TorchDispatchMode):
    """Notes what the host would wait for a GPU with: copies from the host that are not said to be in the order of the
    device's work, and row numbers on the host for rows on the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, first = function.overloadpacket.__name__, args[0] if args else None
        leaves = name == "_to_copy" and torch.device(kwargs.get("device") or "cpu").type == "meta"
        if leaves and first.device.type == "cpu" and not kwargs.get("non_blocking"):
            self.found.append(name)
        if "index" in name and isinstance(first, torch.Tensor) and first.device.type == "meta":
            given = args[1] if isinstance(args[1], list | tuple) else args[2:3]
            self.found += [name for one in given if isinstance(one, torch.Tensor) and one.device.type == "cpu"]
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """The device that holds no data has none to switch off."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def waits_of_stage_1(average=False):
    tokens = IdentityTable("tokens", 40, torch.randn(40, 4, 8, device="meta"))
    weights = torch.randn(32, 16, device="meta")
    labels = torch.arange(12)
    with Waits() as waits:
        if average:
            means = IdentityTable.frozen("means", 40, torch.randn(40, 16, device="meta"))
            losses = stage1.average_step(lambda rows: rows.flatten(1) @ weights, tokens, means, labels)
        else:
            images = torch.randn(12, 16, device="meta")
            losses = stage1.step(lambda rows: rows.flatten(1) @ weights, tokens, images, labels)
        losses["loss"].backward()
        rows, gradients = tokens.lent_gradient()
    assert (rows.device.type, gradients.device.type) == ("cpu", "meta")  # Which rows, the host can ask at any time.
    return waits.found


def test_a_step_of_stage_1_copies_nothing_that_the_host_waits_for():
    assert waits_of_stage_1() == waits_of_stage_1(average=True) == []


def test_a_copy_that_the_host_waits_for_is_found(monkeypatch):
    monkeypatch.setattr(stage1, "to_device", lambda tensor, device: tensor.to(device))
    assert set(waits_of_stage_1()) == {"_to_copy"}


def test_on_a_cpu_nothing_is_copied():
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
