"""Evaluation on many workers: features once, then exact CMC and mAP from each rank's blocks of the gallery.

    encoder ──▶ features of query and gallery (or VehicleID's test) ──▶ [evaluate] ──▶ metrics

The distances are counted by `clipreid.retrieval`; here the counts of the ranks are added up.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipreid.augment import normalise
from clipreid.model import ReIDModel, descriptor
from clipreid.protocols import vehicleid
from clipreid.rerank import evaluate_reranked
from clipreid.retrieval import Labels, retrieve
from cluster.config import Config
from cluster.features import extract
from cluster.team import Team
from shards.index import ShardIndex, SplitIndex


def evaluate(
    model: ReIDModel,
    index: ShardIndex,
    config: Config,
    team: Team,
    on_images: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Metrics as fractions, the same on every rank: mAP, mINP, R1, R5, R10, queries, valid_queries; for VehicleID
    `small`, `medium`, `large`, each with mean and std over the draws. The model is left in evaluation mode.

    Raises:
        DataError: an image cannot be read.
        ModelError: no query has a valid match in the gallery.
    """
    model.eval()
    return measure(lambda split: encode_split(model, index, split, config, team, on_images), index, config, team)


def measure(features: Callable[[str], np.ndarray], index: ShardIndex, config: Config, team: Team) -> dict[str, Any]:
    """The metrics of `evaluate` from the descriptors of whole splits, which `features` is asked for by name."""
    if "test" in index.splits:
        return _evaluate_vehicleid(features("test"), index.split("test"), config, team)
    query, gallery = index.split("query"), index.split("gallery")
    return measure_retrieval(
        np.array(features("query")), labels_of(query), features("gallery"), labels_of(gallery),
        rule=config.eval.rule, rerank=config.eval.rerank, team=team,
    )  # fmt: skip


def measure_retrieval(
    query_features: np.ndarray,
    query: Labels,
    gallery_features: np.ndarray,
    gallery: Labels,
    *,
    rule: str,
    rerank: tuple[int, int, float] | None,
    team: Team,
) -> dict[str, Any]:
    """mAP, mINP, R1, …, and with `rerank` (k1, k2, lambda) the same of the re-ranked distances under "rerank".

    Features float32 [n, D], the same on every rank; the gallery's may be memory-mapped.
    """
    on_device = torch.from_numpy(query_features).to(team.device)
    metrics = retrieve(
        on_device, query, gallery_features, gallery, rule=rule, part=(team.rank, team.world_size),
        reduce_sum=_summed_by(team),
    ).metrics()  # fmt: skip
    if rerank:
        k1, k2, weight = rerank
        metrics["rerank"] = evaluate_reranked(
            torch.from_numpy(query_features), query, torch.from_numpy(np.array(gallery_features)), gallery,
            rule=rule, k1=k1, k2=k2, lam=weight,
        )  # fmt: skip
    return metrics


def encode_split(
    model: ReIDModel,
    index: ShardIndex,
    split: str,
    config: Config,
    team: Team,
    on_images: Callable[[int], None],
) -> np.ndarray:
    """Descriptors of a split, float32 [n, D], L2-normalised, with the side information of each image."""
    rows_of = index.split(split)
    cameras = torch.tensor(rows_of.cameras, device=team.device)
    views = torch.tensor(rows_of.views, device=team.device)

    def encode(images: Tensor, rows: Tensor) -> Tensor:
        return describe(model, config, images, cameras[rows], views[rows])

    return extract(
        encode, index, split, team, image_size=config.model.image_size, batch=config.eval.batch,
        loaders=config.data.loaders, cache_dir=config.data.cache_dir, on_images=on_images,
    )  # fmt: skip


def describe(
    model: ReIDModel, config: Config, images: Tensor, cameras: Tensor | None = None, views: Tensor | None = None
) -> Tensor:
    """Descriptors, float32 [b, D], L2-normalised, of uint8 images [b, 3, H, W]. Without cameras: none is known."""
    pixels = normalise(images, config.data.pixel_mean, config.data.pixel_std)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        features = model.features(pixels, cameras, views)
    return descriptor(features, config.eval.descriptor)


def labels_of(split: SplitIndex) -> Labels:
    return Labels(split.identity_codes, split.cameras, split.times)


def _summed_by(team: Team) -> Callable[[Tensor], Tensor]:
    return lambda tensor: team.patient_sum(tensor.to(team.device), "merge evaluation").to(tensor.device)


def _evaluate_vehicleid(features: np.ndarray, test: SplitIndex, config: Config, team: Team) -> dict[str, Any]:
    return vehicleid(
        torch.from_numpy(np.array(features)).to(team.device), test.identity_codes, test.lists, draws=config.eval.draws,
        seed=config.run.seed, part=(team.rank, team.world_size), reduce_sum=_summed_by(team),
    )  # fmt: skip
