"""Weights applied to images, by this process or by all that torchrun started: evaluation and extraction.

RUN | model.safetensors | authors' checkpoint | CLIP weights ──▶ [apply] ──▶ metrics, or arrays of a feature file
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clipreid.model.reid import ReIDModel, build_models
from clipreid.model.spec import ModelSpec
from clipreid.weights.card import ModelCard
from clipreid.weights.file import load_model
from clipreid.weights.official import official_shapes
from clipreid.weights.pretrained import is_official, read_state_dict
from cluster.evaluation.evaluate import describe, encode_split, measure
from cluster.evaluation.features import extract_batches
from cluster.evaluation.metrics import Progress
from cluster.evaluation.per_query import PerQueryFile
from cluster.ranks.process import choose_device
from cluster.ranks.team import Team
from cluster.settings.config import Config
from cluster.settings.model_spec import configured_spec, model_spec
from shards.loading.folder import FolderLoader
from shards.loading.index import ShardIndex


class Applied:
    """A model with loaded weights, as the settings want it applied."""

    def __init__(
        self, config: Config, path: Path, card: ModelCard | None, index: ShardIndex | None, team: Team | None = None
    ):
        """`card`: of a file of our own, which fits the settings already. team: by default this process alone.
        Raises ModelError where weights do not fit."""
        self.config = config
        self.team = team or Team(device=choose_device(0))
        model = load_model(path)[0] if card else _load_others(config, path, index)
        self.model: ReIDModel = model.to(self.team.device).eval()

    def evaluate(self, index: ShardIndex, progress: Progress, per_query: PerQueryFile | None = None) -> dict[str, Any]:
        """Metrics as of a run, `evaluate.evaluate`. Raises as it does. per_query: as in `measure`."""
        return measure(
            lambda split: self._encode(index, split, progress), index, self.config, self.team, progress, per_query
        )

    def extract_split(self, index: ShardIndex, split: str, progress: Progress) -> dict[str, np.ndarray]:
        """The arrays of a feature file, in index order. Raises DataError for an image that cannot be read."""
        features = self._encode(index, split, progress)
        rows = index.split(split)
        return {
            "features": features,
            "identities": _strings(rows.identity),
            "cameras": rows.cameras,
            "views": rows.views,
            "keys": _strings(rows.keys),
            "splits": np.full(len(rows), split),
            "lists": _strings(rows.lists),
            "times": _strings(rows.times),
        }

    def extract_images(self, folder: str, names: list[str], progress: Progress) -> dict[str, np.ndarray]:
        """The same for the images `names` of a plain folder: keys are the names, all else is unknown."""
        team, batch = self.team, self.config.eval.batch
        loader = FolderLoader(
            folder, names, image_size=self.config.model.image_size, rank=team.rank, world_size=team.world_size,
            batch_size=batch, workers=self.config.data.loaders,
        )  # fmt: skip

        def encode(images: Tensor, rows: Tensor) -> Tensor:
            return describe(self.model, self.config, images)

        with self._shown(progress, "images", len(names)) as on_images:
            features = extract_batches(encode, loader, len(names), batch, team, self.config.data.cache_dir, on_images)
        unknown, empty = np.full(len(names), -1, np.int64), np.full(len(names), "")
        return {
            "features": features,
            **dict.fromkeys(("cameras", "views"), unknown),
            **dict.fromkeys(("identities", "splits", "lists", "times"), empty),
            "keys": np.array(names, str),
        }

    def _encode(self, index: ShardIndex, split: str, progress: Progress) -> np.ndarray:
        with self._shown(progress, split, len(index.split(split))) as on_images:
            return encode_split(self.model, index, split, self.config, self.team, on_images)

    @contextmanager
    def _shown(self, progress: Progress, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A function to be told this rank's images; the first rank shows them for all, which go on alike."""
        if not self.team.is_first:
            yield lambda count: None
            return
        with progress(f"encode {what}") as done:
            yield lambda count: done(min(count * self.team.world_size, total), total)


def _load_others(config: Config, path: Path, index: ShardIndex | None) -> ReIDModel:
    if index is not None and "train" in index.splits:
        spec = model_spec(config, index)
    else:
        spec = _spec_of_shapes(config, path, index)
    model, _ = build_models(spec, str(path), config.run.seed)
    return model


def _spec_of_shapes(config: Config, path: Path, index: ShardIndex | None) -> ModelSpec:
    """Without a training set: its numbers of identities and, without any dataset, of side information, as in the
    file. No camera or view is known then, so it does not matter which of them a row belongs to."""
    identities, sie_rows = 1, 1
    if is_official(read_state_dict(path)):
        shapes = official_shapes(path)
        identities, sie_rows = shapes.identities, max(shapes.sie_rows, 1)
    if index is not None:
        return configured_spec(config, cameras=index.cameras, views=index.views, identities=identities, noun=index.noun)
    views_only = config.model.sie == "view"
    cameras, views = (1, sie_rows) if views_only else (sie_rows, 1)
    return configured_spec(config, cameras=cameras, views=views, identities=identities, noun="person")


def _strings(values: np.ndarray) -> np.ndarray:
    return values.astype(str)
