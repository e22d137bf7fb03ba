"""Layer-wise relevance propagation: a score's relevance handed back through the operations that led to it.

    relevance of an operation's result ──▶ [lrp] ──▶ relevance of what went into it ──▶ relevance maps

The rules of Chefer, Gur, Wolf ("Transformer interpretability beyond attention visualization", CVPR 2021), section 3
and its authors' code. Each conserves relevance: what a rule hands back sums to what it was given, for every image,
as long as no result that has relevance is 0. Through what acts on each value alone, or scales a token (activations,
softmax, LayerNorm, LayerScale), relevance passes as it is; biases take none.

B = images, the first dimension of every tensor but a weight
"""

import torch
from torch import Tensor

EPSILON = 1e-9
"""Keeps quotients finite; relevance of results that are much smaller is lost."""


def through_linear(inputs: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """z+ rule (Eq. 4 and 7: deep Taylor, for inputs of both signs): a result's relevance goes to the inputs in
    proportion to their positive contributions, input x weight.

    inputs: float [B, ..., I]; weight: [O, I]; relevance: of the results, [B, ..., O]. Returns [B, ..., I].
    """
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    above, below = inputs.clamp(min=0), inputs.clamp(max=0)
    share = _quotient(relevance, above @ positive.T + below @ negative.T)
    return above * (share @ positive) + below * (share @ negative)


def through_product(left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix product (Eq. 8 to 10): in proportion to the contributions, left x right, half to each factor.

    A product's relevance would go to both factors in full; normalised (Eq. 9, 10), equal sums are halves.
    left: float [B, ..., I, K]; right: [B, ..., K, J]; relevance: [B, ..., I, J]. Returns those of left and right.
    """
    share = _quotient(relevance, left @ right) / 2
    return left * (share @ right.mT), right * (left.mT @ share)


def through_sum(left: Tensor, right: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Skip connection (Eq. 8 to 10): in proportion to the summands, then each side scaled so that they share the
    image's relevance in proportion to the sizes of their sums. Summands that cancel would make both explode.

    left, right, relevance: float [B, ...]. Returns the relevance of left and right.
    """
    share = _quotient(relevance, left + right)
    sides = left * share, right * share
    sums = [_over_image(side) for side in sides]
    unit = _quotient(_over_image(relevance), sums[0].abs() + sums[1].abs())
    # |sum| / (|left's| + |right's|) x relevance / sum: only the sign of the sum is left of it.
    scaled = [side * (unit * total.sign()) for side, total in zip(sides, sums, strict=True)]
    return scaled[0], scaled[1]


def _over_image(values: Tensor) -> Tensor:
    """Sums over all dimensions but the first, which are kept with size 1."""
    return values.sum(dim=tuple(range(1, values.dim())), keepdim=True)


def _quotient(relevance: Tensor, results: Tensor) -> Tensor:
    """Relevance per unit of the result; 0 where there is no result."""
    return torch.where(results == 0, 0.0, relevance / (results + EPSILON * results.sign()).where(results != 0, 1.0))
