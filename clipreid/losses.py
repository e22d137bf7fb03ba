"""The losses of the paper on features of one rank against features of all ranks; nothing is gathered here.

    features, text features ──▶ gathered from all ranks ──▶ [losses] ──▶ stage1.step, stage2.losses

Anchors are this rank's images, what they are compared with is the global batch; losses that tell an identity from all N
are in `identity_softmax.py`. All arithmetic is float32 (float64 if given), also under autocast: half-precision sums in
a softmax or in squared distances lose the method's figures.

b = images of this rank, B = images of the global batch, D = feature width
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = TypeVar("Loss", bound=Callable[..., Tensor])


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision floats as float32; everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(loss: Loss) -> Loss:
    """Decorator: the loss sees float32 (or float64) tensors, given by position, and runs outside autocast."""

    @functools.wraps(loss)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        args = tuple(at_least_float32(x) if isinstance(x, Tensor) else x for x in args)
        with torch.autocast(args[0].device.type, enabled=False):
            return loss(*args, **kwargs)

    return cast(Loss, wrapper)


@full_precision
def batch_hard_triplet(
    anchors_bD: Tensor, anchor_labels_b: Tensor, features_BD: Tensor, labels_B: Tensor, margin: float
) -> Tensor:
    """Triplet loss with the hardest positive and negative of each anchor (Eq. 7), Euclidean; the mean over anchors.

    The anchors are rows of `features_BD`; the batch holds at least two identities. Ties go to the first row.
    The d² of all pairs only choose; the chosen ones are computed again from differences, which do not cancel.
    """
    with torch.no_grad():
        squared_bB = features_BD.square().sum(1) - 2 * (anchors_bD @ features_BD.T)  # + |anchor|², same for a row
        same_bB = anchor_labels_b[:, None] == labels_B[None, :]
        hardest_positive_b = squared_bB.masked_fill(~same_bB, -torch.inf).argmax(1)
        hardest_negative_b = squared_bB.masked_fill(same_bB, torch.inf).argmin(1)

    def distance(index_b: Tensor) -> Tensor:
        return (anchors_bD - features_BD[index_b]).square().sum(1).clamp(min=1e-12).sqrt()

    return F.relu(distance(hardest_positive_b) - distance(hardest_negative_b) + margin).mean()


@full_precision
def image_to_text(images_bD: Tensor, own_texts_bD: Tensor, texts_BD: Tensor) -> Tensor:
    """Image-to-text contrastive loss (Eq. 2): each image against the texts of all B images of the batch.

    own_texts_bD: the text of each image's identity. texts_BD has one row an image, so an identity with r images
    counts r times in the denominator. Raw dot products, temperature 1. Returns one value an image, [b]: the caller
    averages, since a rank may have no image.
    """
    return (images_bD @ texts_BD.T).logsumexp(1) - (images_bD * own_texts_bD).sum(1)


@full_precision
def text_to_image(own_texts_bD: Tensor, labels_b: Tensor, images_BD: Tensor, labels_B: Tensor) -> Tensor:
    """Text-to-image contrastive loss (Eq. 4): the text of each image's identity against all B images.

    The mean over the images of that identity of minus log-softmax over the batch. Returns one value an image, [b].
    """
    log_prob_bB = (own_texts_bD @ images_BD.T).log_softmax(1)
    positive_bB = (labels_b[:, None] == labels_B[None, :]).to(log_prob_bB.dtype)
    return -(log_prob_bB * positive_bB).sum(1) / positive_bB.sum(1)
