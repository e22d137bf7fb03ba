"""Stage 1: only the identities' prompt tokens learn, against image features computed once.

    feature bank ──▶ batches ──▶ [step] ──▶ prompt tokens ──▶ [all_text_features] ──▶ stage 2

The `average` variant has means over identities in place of the bank, and identities in place of a batch's images.

A step works on identities: the tokens of the batch's U distinct ones are fetched from the ranks that own them, and each
is encoded once over all ranks. Image features of all ranks are gathered once, into the bank, of which every node has a
copy: each rank reads those of the whole batch there. It takes the losses of its own images, a contiguous slice; slices
may be unequal or empty, and every rank joins every collective all the same.

B = images of the global batch, R = ranks, D = feature width
U = distinct identities of the batch, N = all identities
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from clipreid.identity_softmax import identity_cross_entropy
from clipreid.identity_table import IdentityTable
from clipreid.losses import at_least_float32, image_to_text, text_to_image
from clipreid.peers import ALONE, Peers, rank_slice
from clipreid.to_device import to_device

Text = Callable[[Tensor], Tensor]
"""Prompt tokens [n, M, W] -> text features [n, D]; `clipreid.model.prompts.PromptedText`."""

ROWS = 8192  # of the bank, read at a time
TEXT_FEATURES = "text_features"
"""Name of the table that stage 2 starts from."""


def batches(num_images: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers (int64) of an epoch's global batches: a fresh permutation, cut; the last may be partial.

    A pure function of its arguments. Epochs count from 1.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    return [order[start : start + batch_size] for start in range(0, num_images, batch_size)]


def step(
    text: Text, tokens: IdentityTable, images_BD: Tensor, labels_B: Tensor, peers: Peers = ALONE
) -> dict[str, Tensor]:
    """Losses of one global batch (Eq. 2, 4, 5), scaled so that their mean over ranks is the global value.

    images_BD: float, the same on every rank, which takes the losses of the rows `rank_slice(B, rank, R)`.
    labels_B: int64 on the CPU, where finding the distinct ones makes no host wait for a GPU.
    Returns scalars `i2t`, `t2i` and their sum `loss`: local sum x ranks / B.
    """
    own = rank_slice(len(labels_B), peers.rank, peers.world_size)
    identities, place = labels_B.unique(return_inverse=True)
    device = images_BD.device
    texts_BD = encode_identities(text, tokens, identities, peers)[to_device(place, device)]
    labels_B = to_device(labels_B, device)

    i2t = image_to_text(images_BD[own], texts_BD[own], texts_BD)
    t2i = text_to_image(texts_BD[own], labels_B[own], images_BD, labels_B)
    scale = peers.world_size / len(labels_B)
    losses = {"i2t": i2t.sum() * scale, "t2i": t2i.sum() * scale}
    return {**losses, "loss": losses["i2t"] + losses["t2i"]}


def average_step(
    text: Text, tokens: IdentityTable, means: IdentityTable, labels_global: Tensor, peers: Peers = ALONE
) -> dict[str, Tensor]:
    """Loss of one global batch of identities in the `average` variant (Eq. 10), scaled as in `step`.

    means: [N, D], the mean image feature of every identity (`identity_means`).
    labels_global: int64 [B] on the CPU, different identities.
    Returns scalars `t2i`, and `loss`, which is the same: there is no image to text.
    """
    texts = encode_identities(text, tokens, labels_global, peers)
    t2i = identity_cross_entropy(texts, to_device(labels_global, texts.device), means, peers=peers)
    return {"t2i": t2i, "loss": t2i}


def encode_identities(text: Text, tokens: IdentityTable, identities: Tensor, peers: Peers = ALONE) -> Tensor:
    """Text features of the given identities, each encoded on one rank: int64 [U] on the CPU -> float32 (or float64)
    [U, D], on every rank.

    Ranks take contiguous equal shares of ceil(U / R), filled up with repeats of the last identity, which are cut
    again after the all_gather: so no rank is without a forward pass.
    """
    share = -(-len(identities) // peers.world_size)
    places = torch.arange(peers.world_size * share).clamp(max=len(identities) - 1)
    rows = tokens.fetch(identities[places].split(share), peers)
    return peers.all_gather(at_least_float32(text(rows)))[: len(identities)]


@torch.no_grad()
def text_features(text: Text, tokens: IdentityTable, peers: Peers = ALONE, batch_size: int = 1024) -> IdentityTable:
    """The bridge to stage 2: text features of all identities, frozen, each with the rank that owns its tokens [N, D].

    batch_size: identities encoded at a time, which bounds the memory.
    """
    features = [at_least_float32(text(rows)) for rows in tokens.block.split(batch_size) if len(rows)]
    if not features:  # A rank that owns no identity: one prompt tells the width.
        features = [at_least_float32(text(tokens.block.new_zeros(1, *tokens.block.shape[1:])))[:0]]
    return IdentityTable.frozen(TEXT_FEATURES, tokens.num_identities, torch.cat(features), peers)


@torch.no_grad()
def identity_means(
    features: np.ndarray,
    labels: np.ndarray,
    num_identities: int,
    peers: Peers = ALONE,
    device: torch.device | str = "cpu",
) -> IdentityTable:
    """For the `average` variant (Eq. 10): the mean image feature of each identity, summed in float64.

    features: float [n, D] of all images, read a few rows at a time, so that a memory-mapped bank is never copied.
    labels: int64 [n], holding each of 0 … N-1. Returns [N, D] of the features' dtype; a rank sums its own rows.
    """
    own = rank_slice(num_identities, peers.rank, peers.world_size)
    num_own = own.stop - own.start
    sums, counts = torch.zeros(num_own, features.shape[1], dtype=torch.float64), torch.zeros(num_own)
    for start in range(0, len(labels), ROWS):
        here = labels[start : start + ROWS]
        chosen = np.flatnonzero((here >= own.start) & (here < own.stop))
        place = torch.tensor(here[chosen] - own.start)
        sums.index_add_(0, place, torch.from_numpy(features[start : start + ROWS][chosen].astype(np.float64)))
        counts.index_add_(0, place, torch.ones(len(place)))
    means = torch.from_numpy((sums / counts[:, None]).numpy().astype(features.dtype))
    return IdentityTable.frozen("means", num_identities, means.to(device), peers)
