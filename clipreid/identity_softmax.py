"""Cross-entropy over all N identities, from a table of which every rank holds some rows.

    features of a batch, IdentityTable ──▶ [identity_softmax] ──▶ stage1.average_step, stage2.losses

Every rank takes the whole batch against its own rows. What crosses ranks is the features (gathered by the caller) and
three numbers an image: the largest logit, the sum of exponentials, and what is linear in the logits.

B = images of the global batch, N = identities, n = rows of this rank, R = ranks
"""

from typing import Any

import torch
from torch import Tensor

from clipreid.identity_table import IdentityTable
from clipreid.losses import at_least_float32
from clipreid.peers import ALONE, Peers


def identity_cross_entropy(
    features_BD: Tensor, labels_B: Tensor, table: IdentityTable, smoothing: float = 0.0, peers: Peers = ALONE
) -> Tensor:
    """Mean over the batch of the cross-entropy of the logits `features · row` against (1 - smoothing) one-hot +
    smoothing / N (Eq. 6, 8; with smoothing 0 Eq. 10).

    features_BD: all ranks', gathered so that the backward pass sums over ranks; labels_B: int64, on the same device.
    Returns the same scalar on every rank, float32 (float64 where the features are). As with every loss here, the mean
    over ranks counts: the features get R times this rank's part of the gradient, the table's own rows all of theirs.
    """
    features_BD = at_least_float32(features_BD)
    with torch.autocast(features_BD.device.type, enabled=False):
        loss: Tensor = _CrossEntropy.apply(features_BD, table.block, labels_B, table, smoothing, peers)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """By hand, since the softmax is over all ranks' logits and only this rank's are here."""

    @staticmethod
    def forward(
        ctx: Any,
        features_BD: Tensor,
        block_nD: Tensor,
        labels_B: Tensor,
        table: IdentityTable,
        smoothing: float,
        peers: Peers,
    ) -> Tensor:
        logits_Bn = features_BD @ block_nD.T
        own_target = _OwnTarget(labels_B, table)
        linear_B = (1 - smoothing) * own_target.of(logits_Bn) + smoothing / table.num_identities * logits_Bn.sum(1)
        largest_B = logits_Bn.amax(1) if table.own else logits_Bn.new_full((len(labels_B),), -torch.inf)
        largest_B = peers.all_reduce_max(largest_B)
        exponentials_Bn = logits_Bn.sub_(largest_B[:, None]).exp_()
        total_B, linear_B = peers.all_reduce_sum(torch.stack([exponentials_Bn.sum(1), linear_B]))
        ctx.save_for_backward(features_BD, block_nD, exponentials_Bn, total_B)
        ctx.own_target, ctx.smoothing, ctx.identities = own_target, smoothing, table.num_identities
        ctx.world_size = peers.world_size
        losses_B: Tensor = total_B.log() + largest_B - linear_B
        return losses_B.mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features_BD, block_nD, exponentials_Bn, total_B = ctx.saved_tensors
        slope_Bn = exponentials_Bn.div_(total_B[:, None]).sub_(ctx.smoothing / ctx.identities)
        ctx.own_target.subtract(slope_Bn, 1 - ctx.smoothing)
        slope_Bn.mul_(gradient / len(total_B))
        to_block = slope_Bn.T @ features_BD if ctx.needs_input_grad[1] else None
        return slope_Bn @ block_nD * ctx.world_size, to_block, None, None, None, None


class _OwnTarget:
    """Where a batch's labels are in a rank's rows, for the images whose identity is there."""

    def __init__(self, labels_B: Tensor, table: IdentityTable) -> None:
        self.here_B1 = ((labels_B >= table.own.start) & (labels_B < table.own.stop))[:, None]
        self.place_B1 = (labels_B[:, None] - table.own.start).clamp(0, max(len(table.own) - 1, 0))
        self.any = bool(table.own)

    def of(self, logits_Bn: Tensor) -> Tensor:
        """The label's logit [B]; 0 where it is another rank's."""
        if not self.any:
            return logits_Bn.new_zeros(len(logits_Bn))
        return (logits_Bn.gather(1, self.place_B1) * self.here_B1)[:, 0]

    def subtract(self, slope_Bn: Tensor, value: float) -> None:
        """At the label's place, in place."""
        if self.any:
            slope_Bn.scatter_add_(1, self.place_B1, -value * self.here_B1.to(slope_Bn.dtype))
