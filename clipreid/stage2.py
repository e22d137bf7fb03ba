"""Stage 2: the image encoder learns from PK batches; here a batch's features become its loss parts.

    PK batch ──▶ ReIDModel ──▶ [stage2: losses] ──▶ engine.backward

Local images are the anchors; what they are compared with (features for the triplet, labels, image and text features
for the contrastive variants) is gathered from all ranks. The cross-entropies over all identities take the gathered
batch against the rows that each rank owns. All ranks hold equally many images, and the mean over ranks of every loss
part is the value of the global batch.

b = images of this rank, B = images of the global batch, N = identities, D = width of the projected feature
"""

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipreid.identity_softmax import identity_cross_entropy
from clipreid.identity_table import IdentityTable
from clipreid.loss_settings import LossSettings
from clipreid.losses import at_least_float32, batch_hard_triplet, image_to_text, text_to_image
from clipreid.peers import ALONE, Peers
from clipreid.stage1 import Text

if TYPE_CHECKING:
    from clipreid.model.reid import ReIDOutput


def losses(
    output: "ReIDOutput",
    labels: Tensor,
    classifiers: Sequence[IdentityTable],
    settings: LossSettings,
    peers: Peers = ALONE,
    *,
    text_features: IdentityTable | None = None,
    own_texts: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss parts of this rank's images of a PK batch; their means over ranks are those of the global batch.

    labels: int64 [b], same b on every rank. classifiers: of the image feature and of the projected one.
    text_features: frozen [N, D], for i2tce. own_texts: text features of the local images' identities, float [b, D], for
    i2t and t2i: rows of those, or with gradient in the one-stage method (`batch_texts`).
    Returns scalars: `id_img id_proj`, `tri_pre tri_img tri_proj` and those of `i2tce i2t t2i` in use, then the sums
    `id triplet text` and the weighted total `loss`.
    """
    text_losses = settings.text_loss.split("+")
    levels = ("pre", "img", "proj")[3 - settings.triplet_levels :]
    smoothing = settings.label_smoothing
    with torch.autocast(labels.device.type, enabled=False):
        local = {level: at_least_float32(getattr(output.features, level)) for level in levels}
        local |= {f"id_{name}": neck for name, neck in zip(("img", "proj"), output.necks, strict=True)}
        if own_texts is not None:
            local["text"] = at_least_float32(own_texts)
        batch = _gather_columns(local, peers)
        labels_batch = peers.all_gather(labels)

        parts = {
            name: identity_cross_entropy(batch[name], labels_batch, classifier, smoothing, peers)
            for name, classifier in zip(("id_img", "id_proj"), classifiers, strict=True)
        }
        for level in levels:
            parts[f"tri_{level}"] = batch_hard_triplet(
                local[level], labels, batch[level], labels_batch, settings.margin
            )
        if "i2tce" in text_losses:
            assert text_features is not None
            parts["i2tce"] = identity_cross_entropy(batch["proj"], labels_batch, text_features, smoothing, peers)
        if "i2t" in text_losses:
            parts["i2t"] = image_to_text(local["proj"], local["text"], batch["text"]).mean()
        if "t2i" in text_losses:
            parts["t2i"] = text_to_image(local["text"], labels, batch["proj"], labels_batch).mean()
    return _with_totals(parts, settings)


def batch_texts(text: Text, tokens: IdentityTable, identities: Tensor, per: int, peers: Peers = ALONE) -> Tensor:
    """Text features [b, D] of this rank's images of a PK batch, each identity encoded once (the one-stage method).

    identities: int64 [P] on the CPU, of the global batch; per: K, images of each, side by side.
    """
    rows = tokens.fetch(identities.tensor_split(peers.world_size), peers)
    return text(rows).repeat_interleave(per, dim=0)


def _gather_columns(local: dict[str, Tensor], peers: Peers) -> dict[str, Tensor]:
    """{name: [b, D_i]} -> {name: [B, D_i]} in one all_gather, side by side."""
    gathered = peers.all_gather(torch.cat(list(local.values()), dim=1))
    return dict(zip(local, gathered.split([x.shape[1] for x in local.values()], dim=1), strict=True))


def _with_totals(parts: dict[str, Tensor], settings: LossSettings) -> dict[str, Tensor]:
    identity = parts["id_img"] + parts["id_proj"]
    triplet = _sum(value for name, value in parts.items() if name.startswith("tri_"))
    loss = settings.id_weight * identity + settings.triplet_weight * triplet
    totals = {"id": identity, "triplet": triplet}
    if settings.text_loss != "none":
        totals["text"] = _sum(parts[name] for name in settings.text_loss.split("+"))
        loss = loss + settings.text_weight * totals["text"]
    return {**parts, **totals, "loss": loss}


def _sum(values: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, values)
