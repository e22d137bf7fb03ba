"""Evaluation on many workers: features once, then exact CMC and mAP from each rank's blocks of the gallery.

encoder ──▶ [evaluate]: features of query and gallery (or VehicleID's test) ──▶ measure ──▶ metrics
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipreid.augment import normalise
from clipreid.model.reid import Features, ReIDModel, descriptor
from clipreid.retrieval.metrics import Labels
from cluster.evaluation.features import Progress, extract, no_progress
from cluster.evaluation.metrics import Show, measure_retrieval, measure_vehicleid, silent
from cluster.evaluation.per_query import PerQueryFile
from cluster.ranks.team import Team
from cluster.settings.config import Config
from shards.loading.index import ShardIndex, SplitIndex


def evaluate(
    model: ReIDModel,
    index: ShardIndex,
    config: Config,
    team: Team,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Metrics as fractions, the same on every rank: mAP, mINP, R1, R5, R10, queries, valid_queries; for VehicleID
    `small`, `medium`, `large`, each with mean and std over the draws. The model is left in evaluation mode.

    Raises:
        DataError: an image cannot be read.
        ModelError: no query has a valid match in the gallery.
    """
    model.eval()
    return measure(lambda split: encode_split(model, index, split, config, team, progress), index, config, team)


def measure(
    features: Callable[[str], np.ndarray],
    index: ShardIndex,
    config: Config,
    team: Team,
    show: Show = silent,
    per_query: PerQueryFile | None = None,
) -> dict[str, Any]:
    """The metrics of `evaluate` from the descriptors of whole splits, which `features` is asked for by name.

    per_query: not for VehicleID, whose queries differ from draw to draw.
    """
    if "test" in index.splits:
        test = index.split("test")
        return measure_vehicleid(
            np.array(features("test")), test.identity_codes, test.lists, draws=config.eval.draws,
            seed=config.run.seed, team=team,
        )  # fmt: skip
    query, gallery = index.split("query"), index.split("gallery")
    return measure_retrieval(
        np.array(features("query")), labels_of(query), features("gallery"), labels_of(gallery),
        rule=config.eval.rule, rerank=config.eval.rerank, team=team, show=show,
        per_query=per_query, keys=(query.keys, gallery.keys),
    )  # fmt: skip


def encode_split(
    model: ReIDModel,
    index: ShardIndex,
    split: str,
    config: Config,
    team: Team,
    progress: Progress,
) -> np.ndarray:
    """Descriptors of a split, float32 [n, D], L2-normalised, with the side information of each image."""
    rows_of = index.split(split)
    cameras = torch.tensor(rows_of.cameras, device=team.device)
    views = torch.tensor(rows_of.views, device=team.device)

    def encode(images: Tensor, rows: Tensor) -> Tensor:
        return describe(model, config, images, cameras[rows], views[rows])

    return extract(
        encode, index, split, team, image_size=config.model.image_size, batch=config.eval.batch,
        loaders=config.data.loaders, cache_dir=config.data.cache_dir, cache_gb=config.data.cache_gb,
        progress=progress,
    )  # fmt: skip


def describe(
    model: ReIDModel, config: Config, images: Tensor, cameras: Tensor | None = None, views: Tensor | None = None
) -> Tensor:
    """Descriptors, float32 [b, D], L2-normalised, of uint8 images [b, 3, H, W]. Without cameras: none is known."""
    pixels = normalise(images, config.data.pixel_mean, config.data.pixel_std)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        features = model.features(pixels, cameras, views)
        if config.eval.flip:
            mirrored = model.features(pixels.flip(3), cameras, views)
            features = Features(*((a + b) / 2 for a, b in zip(features, mirrored, strict=True)))
    return descriptor(features, config.eval.descriptor)


def labels_of(split: SplitIndex) -> Labels:
    return Labels(split.identity_codes, split.cameras, split.times)
