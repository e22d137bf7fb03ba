"""BatchNorm over the images of all ranks, so that the loss is that of the global batch.

    ReIDModel, peers ──▶ [globalize_batchnorm] ──▶ encoder and necks with statistics of all ranks

Works on any device that the peers' all_gather works on (`torch.nn.SyncBatchNorm` refuses CPU tensors). Ranks may hold
different numbers of values per channel, at least one each. Evaluation mode is untouched.

C = channels, R = ranks
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipreid.peers import Peers


def globalize_batchnorm(model: nn.Module, peers: Peers) -> None:
    """Replace every BatchNorm inside `model` by one over all ranks that shares its parameters and buffers.

    Names in the state dict stay. Every rank has to run the same layers in the same order.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
    for name, layer in layers:
        model.set_submodule(name, GlobalBatchNorm(layer, peers))


class GlobalBatchNorm(nn.Module):
    """BatchNorm1d or 2d whose statistics in training mode come from all ranks, through one all_gather."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, layer: _BatchNorm, peers: Peers) -> None:
        """`layer` keeps running statistics, of which each batch moves a fixed share (momentum)."""
        super().__init__()
        self.peers = peers
        assert layer.momentum is not None
        self.eps, self.momentum = layer.eps, layer.momentum
        self.weight, self.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers():
            self.register_buffer(name, buffer)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """float [n, C] or [n, C, H, W] -> the same shape and dtype."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        mean, variance = self._global_statistics(x)
        # The fused kernel takes its statistics as constants. Their gradients go through the weight and the
        # bias, written so that they keep their values: a factor 1 and a term 0.
        constant_mean, constant_variance = mean.detach(), variance.detach()
        weight = self.weight * ((constant_variance + self.eps) / (variance + self.eps)).sqrt()
        bias = self.bias + (constant_mean - mean) * self.weight * (variance + self.eps).rsqrt()
        return F.batch_norm(x, constant_mean, constant_variance, weight, bias, training=False, eps=self.eps)

    def _global_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C] over all ranks (Chan et al. 1979); running statistics move on."""
        mean, squares = _Moments.apply(x)
        count = mean.new_full((1,), x.numel() // x.shape[1])
        gathered = self.peers.all_gather(torch.cat([mean, squares, count])[None])
        mean_RC, squares_RC, count_R1 = gathered.split([len(mean), len(mean), 1], dim=1)

        count = count_R1.sum()
        mean = (mean_RC * count_R1).sum(0) / count
        squares = (squares_RC + count_R1 * (mean_RC - mean).square()).sum(0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((squares / (count - 1)).to(self.running_var.dtype), self.momentum)
        return mean, squares / count


class _Moments(torch.autograd.Function):
    """Mean and sum of squared differences from it per channel, [C] each, at least float32.

    By hand, because differentiating the expression keeps the differences, a second copy of x, per layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        others = [d for d in range(x.dim()) if d != 1]
        mean = wide.mean(others)
        differences = wide - _per_channel(mean, x)
        ctx.save_for_backward(x, mean)
        return mean, differences.square_().sum(others)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_squares: Tensor) -> Tensor:
        x: Tensor
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        differences = x - _per_channel(mean, x)
        grad = differences.mul_(_per_channel(2 * grad_squares, x)).add_(_per_channel(grad_mean / count, x))
        return grad.to(x.dtype)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C], shaped to act on the channels of x."""
    return values.view(-1, *[1] * (x.dim() - 2))
