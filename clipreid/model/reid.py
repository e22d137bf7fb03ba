"""The re-identification model: image encoder, side information and necks.

    augment ──▶ [reid: encoder ──▶ necks] ──▶ stage2.losses ◀── classifiers
    normalise ──▶ [reid: encoder ──▶ descriptor] ──▶ retrieval

The classifiers behind the necks have a row per identity: they are `clipreid.identity_table`s. Weights come from
`clipreid.weights`. Names of parameters are those of the checkpoints that the paper's authors released
(`image_encoder.*`, `bottleneck.*`, `cv_embed`).

B = images, W = width of the image tower
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipreid.model.encoders import Features, ImageEncoder
from clipreid.model.in_pieces import in_pieces
from clipreid.model.spec import FeatureName, ModelSpec


class ReIDOutput(NamedTuple):
    """What stage 2's losses are made of, at least float32 whatever precision the encoder ran in."""

    features: Features
    """Before the necks: float [B, *] each."""
    necks: tuple[Tensor, Tensor]
    """The image feature and the projected one behind their necks, float [B, *]: what the classifiers tell identities
    by."""


class ReIDModel(nn.Module):
    """Image encoder with side information, and a neck for each of its last two features."""

    def __init__(self, spec: ModelSpec, image_encoder: ImageEncoder) -> None:
        super().__init__()
        self.sie, self.sie_coefficient = spec.sie, spec.sie_coefficient
        self.cameras, self.views = spec.cameras, spec.views
        self.image_encoder = image_encoder
        _, img, proj = image_encoder.widths
        self.bottleneck, self.bottleneck_proj = nn.BatchNorm1d(img), nn.BatchNorm1d(proj)
        self.cv_embed = nn.Parameter(drawn_side_information(spec.sie_rows, img)) if spec.sie_rows else None
        for neck in (self.bottleneck, self.bottleneck_proj):
            neck.bias.requires_grad_(False)  # stays 0, so that the classifier's planes pass through the origin

    def forward(
        self,
        images: Tensor,
        cameras: Tensor | None = None,
        views: Tensor | None = None,
        micro_batch: int | None = None,
    ) -> ReIDOutput:
        """Float images [B, 3, H, W], cameras and views int64 [B] (-1 = unknown), to features before and behind the
        necks. micro_batch: images that the encoder takes at a time (`in_pieces`); None: all at once."""
        if micro_batch is None or micro_batch >= len(images):
            features = self.features(images, cameras, views)
        else:
            features = Features(*in_pieces(self.features, (images, cameras, views), self._encoding, micro_batch))
        with torch.autocast(images.device.type, enabled=False):  # BatchNorm statistics in full precision
            necks = self.bottleneck(features.img), self.bottleneck_proj(features.proj)
        return ReIDOutput(features, necks)

    @property
    def _encoding(self) -> list[nn.Parameter]:
        """What `features` computes with, and trains."""
        own = [] if self.cv_embed is None else [self.cv_embed]
        return [p for p in (*self.image_encoder.parameters(), *own) if p.requires_grad]

    def features(self, images: Tensor, cameras: Tensor | None = None, views: Tensor | None = None) -> Features:
        """Features before the necks, at least float32. Without cameras and views: without side information."""
        features = self.image_encoder(images, self.side_information(cameras, views))
        return Features(*(value.to(torch.promote_types(value.dtype, torch.float32)) for value in features))

    def side_information(self, cameras: Tensor | None, views: Tensor | None) -> Tensor | None:
        """Vectors [B, W] to add to the tokens (TransReID's SIE), from cameras and views int64 [B].

        A camera or view that is unknown (-1), or that the table has no row for, gives zero. None without a table, or
        where neither cameras nor views are given.
        """
        if self.cv_embed is None or (cameras is None and views is None):
            return None
        row: Tensor | int = 0
        known: Tensor | bool = True
        for used, values, count in (("camera", cameras, self.cameras), ("view", views, self.views)):
            if used in self.sie:
                assert values is not None, f"model.sie={self.sie} needs the {used}s of the images"
                row = row * count + values
                known = known & (values >= 0) & (values < count)
        assert isinstance(known, Tensor), "a table without rows for cameras and views"
        return self.sie_coefficient * self.cv_embed[row * known] * known.unsqueeze(1)


def drawn_side_information(rows: int, width: int) -> Tensor:
    """A table to begin with, [rows, width], of the standard deviation of the paper's authors."""
    return nn.init.trunc_normal_(torch.empty(rows, width), std=0.02)


def descriptor(features: Features, chosen: Sequence[FeatureName]) -> Tensor:
    """What images are compared by: the chosen features concatenated, then L2-normalised as one vector, [B, sum]."""
    return F.normalize(torch.cat([getattr(features, name) for name in chosen], dim=1), dim=1)
