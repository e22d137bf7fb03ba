"""Weights at work on images, in this process or in all that torchrun started: evaluation and extraction.

    a run's, the authors' or CLIP's weights ──▶ [inference] ──▶ metrics, or arrays of a feature file

Features and metrics do not depend on the number of processes.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clipreid.identity_table import IdentityTable
from clipreid.model.prompts import PromptedText
from clipreid.model.reid import ReIDModel
from clipreid.model.spec import ModelSpec
from clipreid.peers import ALONE
from clipreid.weights.card import ModelCard
from clipreid.weights.file import load_model, load_text
from clipreid.weights.initial import build_models, empty_models
from clipreid.weights.official import image_side, load_official, official_shapes, renamed
from clipreid.weights.pretrained import is_official, read_state_dict
from clipreid.weights.tables import TOKENS, load_table, taken_tables
from cluster.evaluation.evaluate import descriptors, encode_split
from cluster.evaluation.features import PassSettings, Progress, extract_images
from cluster.evaluation.metrics import ShowProgress, measure, show_nothing
from cluster.evaluation.open_set import OpenSetSettings
from cluster.evaluation.per_query import PerQueryFile
from cluster.evaluation.trained import trained_precision
from cluster.ranks.arithmetic import settled
from cluster.ranks.process import choose_device
from cluster.ranks.team import Team
from cluster.settings.config import Config
from cluster.settings.model_spec import configured_spec
from shards.loading.folder_images import FolderImages
from shards.loading.index import ShardIndex


class Inference:
    """A model with loaded weights, used as the settings say."""

    def __init__(
        self, config: Config, path: Path, card: ModelCard | None, index: ShardIndex | None, team: Team | None = None
    ):
        """card: of a file of our own, which fits the settings already. team: by default this process alone.

        Raises ModelError where weights do not fit.
        """
        self.team = team or Team(device=choose_device(0))
        self.config = settled(config, self.team, trained_precision(card) if card else None)
        model = load_model(path)[0] if card else _load_others(config, path, index)
        self.model: ReIDModel = model.to(self.team.device).eval()

    def evaluate(
        self,
        index: ShardIndex,
        show: ShowProgress,
        per_query: PerQueryFile | None = None,
        open_set: OpenSetSettings | None = None,
    ) -> dict[str, Any]:
        """Metrics as of a run, `evaluate.evaluate`. Raises as it does. per_query, open_set: as in `measure`."""

        def encode(split: str) -> np.ndarray:
            return self.encode(index, split, show)

        return measure(encode, index, self.config, self.team, show, per_query, open_set)

    def extract_split(self, index: ShardIndex, split: str, show: ShowProgress) -> dict[str, np.ndarray]:
        """The arrays of a feature file, in index order. Raises DataError for an image that cannot be read."""
        features = self.encode(index, split, show)
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

    def extract_images(self, folder: str, names: list[str], show: ShowProgress) -> dict[str, np.ndarray]:
        """The same for the images `names` of a plain folder: keys are the names, all else is unknown."""
        team, settings = self.team, PassSettings.of(self.config)
        folder_images = FolderImages(folder, names, settings.image_size)

        def encode(images: Tensor, rows: Tensor) -> Tensor:
            return descriptors(self.model, self.config, images)

        with self._shown(show, "images") as progress:
            features = extract_images(encode, folder_images, team, settings, progress)
        unknown, empty = np.full(len(names), -1, np.int64), np.full(len(names), "")
        return {
            "features": features,
            **dict.fromkeys(("cameras", "views"), unknown),
            **dict.fromkeys(("identities", "splits", "lists", "times"), empty),
            "keys": np.array(names, str),
        }

    def encode(self, index: ShardIndex, split: str, show: ShowProgress) -> np.ndarray:
        """Descriptors of a split, as `encode_split`, whose errors it raises."""
        with self._shown(show, split) as progress:
            return encode_split(self.model, index, split, self.config, self.team, progress)

    def _shown(self, show: ShowProgress, what: str) -> AbstractContextManager[Progress]:
        """The first rank shows the images of all."""
        return (show if self.team.is_first else show_nothing)(f"encode {what}")


def _load_others(config: Config, path: Path, index: ShardIndex | None) -> ReIDModel:
    if is_official(state := read_state_dict(path)):
        shapes = official_shapes(state, str(path))
        spec = _spec_for_use(config, index, shapes.identities, max(shapes.sie_rows, 1))
        model, text = empty_models(spec)
        load_official(model, text, image_side(state), spec, str(path))
        return model
    return build_models(_spec_for_use(config, index, 1, 1), str(path), config.run.seed).model


def load_prompts(
    config: Config, path: Path, card: ModelCard | None, index: ShardIndex | None
) -> tuple[PromptedText, IdentityTable] | None:
    """The text side of weights, and the tokens of all their training identities; None where they hold no prompts.

    Raises ModelError where those of others do not fit the settings.
    """
    if card:
        text, tokens = load_text(path), load_table(path, TOKENS)
        return None if text is None or tokens is None else (text, tokens)
    state = read_state_dict(path)
    if not is_official(state):
        return None
    shapes = official_shapes(state, str(path))
    spec = _spec_for_use(config, index, shapes.identities, max(shapes.sie_rows, 1))
    model, empty_text = empty_models(spec)
    filled, tokens = (
        load_official(model, empty_text, state, spec, str(path)),
        taken_tables(renamed(state), ALONE).tokens,
    )
    return None if filled is None or tokens is None else (filled, tokens)


def _spec_for_use(config: Config, index: ShardIndex | None, identities: int, sie_rows: int) -> ModelSpec:
    """What only training needs is as in the file: its identities, whatever the dataset has, and no prompts. Without any
    dataset no camera or view is known, so it does not matter which of them a row of side information belongs to."""
    if index is not None:
        return configured_spec(config, cameras=index.cameras, views=index.views, identities=identities, noun=index.noun)
    views_only = config.model.sie == "view"
    cameras, views = (1, sie_rows) if views_only else (sie_rows, 1)
    return configured_spec(config, cameras=cameras, views=views, identities=identities, noun="person")


def _strings(values: np.ndarray) -> np.ndarray:
    return values.astype(str)
