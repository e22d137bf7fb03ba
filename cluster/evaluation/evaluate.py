"""Evaluation on many workers: features once, then exact CMC and mAP from each rank's blocks of the gallery.

    encoder ──▶ [evaluate]: descriptors of query and gallery (or of VehicleID's test) ──▶ metrics.measure ──▶ metrics

The metrics are the same bit by bit for any number of workers, and of threads on a CPU.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipreid.augment import normalise
from clipreid.model.encoders import Features
from clipreid.model.reid import ReIDModel, descriptor
from cluster.evaluation.features import PassSettings, Progress, extract, no_progress
from cluster.evaluation.metrics import measure
from cluster.ranks.arithmetic import encoder_autocast
from cluster.ranks.team import Team
from cluster.settings.config import Config
from shards.loading.index import ShardIndex


def evaluate(
    model: ReIDModel, index: ShardIndex, config: Config, team: Team, progress: Progress = no_progress
) -> dict[str, Any]:
    """Metrics as fractions, the same on every rank: mAP, mINP, R1, R5, R10, TPR@FPR, queries, valid_queries; for
    VehicleID `small`, `medium`, `large`, each with mean and std over the draws. The model is left in evaluation mode.
    TPR@FPR is the share of pairs of one identity accepted at the distance where at most 1e-4, 1e-3, 1e-2 of the pairs
    of different identities are.

    Raises:
        DataError: an image cannot be read.
        ModelError: no query has a valid match in the gallery.
    """
    model.eval()
    return measure(lambda split: encode_split(model, index, split, config, team, progress), index, config, team)


def encode_split(
    model: ReIDModel, index: ShardIndex, split: str, config: Config, team: Team, progress: Progress = no_progress
) -> np.ndarray:
    """Descriptors of a split, float32 [n, D], L2-normalised, with the side information of each image."""
    rows_of = index.split(split)
    cameras = torch.tensor(rows_of.cameras, device=team.device)
    views = torch.tensor(rows_of.views, device=team.device)

    def encode(images: Tensor, rows: Tensor) -> Tensor:
        return descriptors(model, config, images, cameras[rows], views[rows])

    return extract(encode, index, split, team, PassSettings.of(config), progress)


def descriptors(
    model: ReIDModel, config: Config, images: Tensor, cameras: Tensor | None = None, views: Tensor | None = None
) -> Tensor:
    """Descriptors, float32 [b, D], L2-normalised, of uint8 images [b, 3, H, W]. Without cameras: none is known."""
    pixels = normalise(images, config.data.pixel_mean, config.data.pixel_std)
    with encoder_autocast(config.train, pixels.device):
        features = model.features(pixels, cameras, views)
        if config.eval.flip:
            mirrored = model.features(pixels.flip(3), cameras, views)
            features = Features(*((a + b) / 2 for a, b in zip(features, mirrored, strict=True)))
    return descriptor(features, config.eval.descriptor)
