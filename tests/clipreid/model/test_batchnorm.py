"""BatchNorm over ranks equals BatchNorm over the whole batch. With real processes: test_distributed_losses.py."""

import pytest
import torch
from torch import nn

from clipreid.model.batchnorm import GlobalBatchNorm, globalize_batchnorm
from clipreid.peers import ALONE, Alone
from tests.helpers.rank_threads import run_ranks
from tests.helpers.tolerances import close


def plain_layer(channels, two_dimensional):
    layer = (nn.BatchNorm2d if two_dimensional else nn.BatchNorm1d)(channels).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.copy_(torch.randn(channels, generator=generator))
        layer.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
    return layer


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (2, 1, 4, 1)])
@pytest.mark.parametrize("two_dimensional", [False, True])
def test_outputs_gradients_and_running_statistics_equal_one_process(sizes, two_dimensional):
    channels, n = 5, sum(sizes)
    shape = (n, channels, 4, 3) if two_dimensional else (n, channels)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 7
    target = torch.randn(shape, generator=generator, dtype=torch.float64)

    whole = plain_layer(channels, two_dimensional)
    whole_x = x.clone().requires_grad_()
    expected = whole(whole_x)
    (expected * target).sum().backward()

    x_parts = [part.requires_grad_() for part in x.clone().split(list(sizes))]
    holders = [nn.Sequential(plain_layer(channels, two_dimensional)) for _ in sizes]

    def rank_output(peers):
        globalize_batchnorm(holders[peers.rank], peers)
        return holders[peers.rank](x_parts[peers.rank])

    outputs = run_ranks(len(sizes), rank_output)
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=0, atol=1e-12)
    (torch.cat(outputs) * target).sum().backward()
    torch.testing.assert_close(torch.cat([p.grad for p in x_parts]), whole_x.grad, rtol=0, atol=1e-12)
    for name in ("weight", "bias"):
        summed = sum(getattr(holder[0], name).grad for holder in holders)
        torch.testing.assert_close(summed, getattr(whole, name).grad, rtol=0, atol=1e-11)
    for holder in holders:
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(getattr(holder[0], name), buffer, rtol=0, atol=1e-12)


def test_float32_statistics_survive_a_mean_far_from_zero():
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000
    holder = nn.Sequential(nn.BatchNorm2d(3))
    globalize_batchnorm(holder, ALONE)
    exact = nn.BatchNorm2d(3).double()(x.double())
    close(holder(x), exact, atol=1e-3)


def test_bfloat16_input_uses_float32_statistics():
    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0)).bfloat16() + 3
    holder = nn.Sequential(nn.BatchNorm1d(4))
    globalize_batchnorm(holder, ALONE)
    y = holder(x)
    assert y.dtype == torch.bfloat16
    close(holder[0].running_mean / 0.1, x.double().mean(0), atol=1e-5)
    y.float().square().sum().backward()


def test_names_parameters_and_evaluation_are_those_of_the_plain_layer():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    before = {name: tensor.data_ptr() for name, tensor in plain.state_dict(keep_vars=True).items()}
    x = torch.randn(2, 3, 5, 5)
    expected = plain.eval()(x)
    globalize_batchnorm(plain, ALONE)
    after = {name: tensor.data_ptr() for name, tensor in plain.state_dict(keep_vars=True).items()}
    assert isinstance(plain[1][0], GlobalBatchNorm) and before == after
    assert torch.equal(plain(x), expected)


def test_one_gather_per_layer():
    calls = []

    class Counting(Alone):
        def all_gather(self, tensor):
            calls.append(tensor.shape)
            return tensor

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    globalize_batchnorm(model, Counting())
    model(torch.randn(4, 3))
    assert calls == [(1, 7), (1, 5)]
