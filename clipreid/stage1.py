"""Stage 1: only the identities' prompt tokens learn, against image features computed once.

    feature bank ──▶ batches ──▶ [step] ──▶ prompt tokens ──▶ [all_text_features] ──▶ stage 2

The `average` variant has means over identities in place of the bank, and identities in place of a batch's images.

A step works on identities: each of the batch's U distinct ones is encoded once over all ranks. Images are split over
ranks in contiguous slices that may be unequal or empty; every rank joins every all_gather all the same.

b = images of this rank, B = images of the global batch, R = ranks, D = feature width
U = distinct identities of the batch, N = all identities
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from clipreid.losses import at_least_float32, image_to_text, text_to_image, text_to_mean_image
from clipreid.peers import ALONE, Peers, all_gather_unequal

ROWS = 8192  # of the bank, read at a time


def batches(num_images: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers (int64) of an epoch's global batches: a fresh permutation, cut; the last may be partial.

    A pure function of its arguments. Epochs count from 1.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    return [order[start : start + batch_size] for start in range(0, num_images, batch_size)]


def rank_slice(num_images: int, rank: int, world_size: int) -> slice:
    """A rank's contiguous slice of a batch; sizes differ by at most one, and are 0 where ranks outnumber images."""
    return slice(num_images * rank // world_size, num_images * (rank + 1) // world_size)


def step(
    text: Callable[[Tensor], Tensor],
    images_local: Tensor,
    labels_local: Tensor,
    labels_global: Tensor,
    peers: Peers = ALONE,
) -> dict[str, Tensor]:
    """Losses of one global batch (Eq. 2, 4, 5), scaled so that their mean over ranks is the global value.

    text: int64 labels [n] -> text features [n, D], differentiable in the tokens.
    images_local: float [b, D], the rows `rank_slice(B, rank, R)` of the batch; b may be 0.
    labels_global: int64 [B]; may stay on the CPU, where finding the distinct ones makes no host wait for a
    GPU.
    Returns scalars `i2t`, `t2i` and their sum `loss`: local sum x ranks / B.
    """
    slices = [rank_slice(len(labels_global), rank, peers.world_size) for rank in range(peers.world_size)]
    own = slices[peers.rank]
    identities, place = labels_global.unique(return_inverse=True)
    device = images_local.device
    identity_texts = encode_identities(text, identities.to(device), peers)
    texts = identity_texts[place.to(device)]
    images = all_gather_unequal(images_local, [rows.stop - rows.start for rows in slices], peers)

    i2t = image_to_text(images_local, texts[own], texts)
    t2i = text_to_image(texts[own], labels_local, images, labels_global.to(device))
    scale = peers.world_size / len(labels_global)
    losses = {"i2t": i2t.sum() * scale, "t2i": t2i.sum() * scale}
    return {**losses, "loss": losses["i2t"] + losses["t2i"]}


def average_step(
    text: Callable[[Tensor], Tensor], means: Tensor, labels_global: Tensor, peers: Peers = ALONE
) -> dict[str, Tensor]:
    """Loss of one global batch of identities in the `average` variant (Eq. 10), scaled as in `step`.

    means: float [N, D], the mean image feature of every identity, whole on every rank.
    labels_global: int64 [B], different identities, on the device of `means`; a rank takes its `rank_slice`.
    Returns scalars `t2i`, and `loss`, which is the same: there is no image to text.
    """
    own = rank_slice(len(labels_global), peers.rank, peers.world_size)
    texts = encode_identities(text, labels_global, peers)
    t2i = text_to_mean_image(texts[own], labels_global[own], means).sum() * (peers.world_size / len(labels_global))
    return {"t2i": t2i, "loss": t2i}


def encode_identities(text: Callable[[Tensor], Tensor], identities: Tensor, peers: Peers = ALONE) -> Tensor:
    """Text features of the given identities, each encoded on one rank. int64 [U] -> float32 (or float64) [U, D].

    Ranks take contiguous equal shares of ceil(U / R), filled up with repeats of the last identity, which are cut
    again after the all_gather: so no rank is without a forward pass.
    """
    share = -(-len(identities) // peers.world_size)
    first = peers.rank * share
    own = torch.arange(first, first + share, device=identities.device).clamp(max=len(identities) - 1)
    return peers.all_gather(at_least_float32(text(identities[own])))[: len(identities)]


@torch.no_grad()
def all_text_features(
    text: Callable[[Tensor], Tensor],
    num_identities: int,
    peers: Peers = ALONE,
    device: torch.device | str = "cpu",
    batch_size: int = 1024,
) -> Tensor:
    """The bridge to stage 2: text features of identities 0 … N-1, frozen, on every rank. Returns float32 [N, D].

    batch_size: identities encoded at a time over all ranks, which bounds the memory.
    """
    chunks = torch.arange(num_identities, device=device).split(batch_size)
    return torch.cat([encode_identities(text, chunk, peers) for chunk in chunks])


def identity_means(features: np.ndarray, labels: np.ndarray, num_identities: int) -> np.ndarray:
    """For the `average` variant (Eq. 10): the mean image feature of each identity, summed in float64.

    features: float [n, D], read a few rows at a time, so that a memory-mapped bank is never copied. labels: int64
    [n], holding each of 0 … N-1. Returns [N, D] of the features' dtype.
    """
    sums = torch.zeros(num_identities, features.shape[1], dtype=torch.float64)
    for start in range(0, len(labels), ROWS):
        rows = slice(start, start + ROWS)
        sums.index_add_(0, torch.tensor(labels[rows]), torch.from_numpy(features[rows].astype(np.float64)))
    counts = np.bincount(labels, minlength=num_identities)
    return (sums.numpy() / counts[:, None]).astype(features.dtype)
