"""Weights to be used: found, and compared with the settings and the dataset; no torch, no weights read.

    --weights RUN | FILE ──▶ [find_weights] ──▶ inference

A file of our own says what it was trained with, so settings that contradict it are refused here, and what may differ is
noted (`trained.py`). Files of others (CLIP's, the authors') are compared with the settings when they are read.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from clipreid.model.spec import ModelSpec
from clipreid.weights.card import MODEL_FILE, ModelCard, find_card, weights_file
from cluster.errors import ConfigError
from cluster.evaluation.trained import Trained
from cluster.settings.config import WEIGHT_SUFFIXES, Config
from cluster.settings.model_spec import configured_spec
from cluster.settings.paths import shipped_file
from shards.leftovers import remove_leftovers, working_name
from shards.loading.index import ShardIndex
from shards.storage import is_local, join, read_bytes

SPEC_SETTINGS = ("image_size", "stride", "sie", "sie_tokens", "sie_coefficient")
"""Settings of the model that its specification has by the same names, beside the architecture."""


@dataclass(frozen=True)
class Weights:
    """Weights to be used, and what they say of themselves."""

    path: Path
    card: ModelCard | None
    """None for a file of others."""
    trained: Trained

    def check(self, config: Config, index: ShardIndex | None, keys: tuple[str, ...]) -> None:
        """Raises ConfigError as `check_fits`. Dataset and settings `keys` that differ from the training are noted."""
        if self.card:
            check_fits(self.card, config, index, self.trained.source)
            self.trained.note_differences(config, index, keys)


@contextmanager
def open_weights(weights: str) -> Iterator[Weights]:
    """While the block runs, as `local_weights`, whose errors it raises."""
    with local_weights(weights) as path:
        card = find_card(path)
        yield Weights(path, card, Trained.of(weights, card))


@contextmanager
def local_weights(weights: str) -> Iterator[Path]:
    """The file behind a run folder or a file, either of them a path or an fsspec URL, while the block runs.

    Raises ModelError or ConfigError where there is none.
    """
    if is_local(weights):
        yield weights_file(Path(weights.removeprefix("file://")))
        return
    url = weights if PurePosixPath(weights).suffix in WEIGHT_SUFFIXES else join(weights, MODEL_FILE)
    with _temporary_folder() as folder:
        path = folder / PurePosixPath(url).name
        try:
            path.write_bytes(read_bytes(url))
        except FileNotFoundError:
            raise ConfigError(f"--weights {url}: no such file") from None
        yield path


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for this process alone. Those of killed processes are removed first."""
    place = Path(tempfile.gettempdir())
    remove_leftovers(place, "weights")
    folder = place / working_name("weights")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_fits(card: ModelCard, config: Config, index: ShardIndex | None, source: str) -> None:
    """Raises ConfigError, one line a fault with both values, unless weights and settings compute the same features.

    What only training needs may differ: identities, prompts, the dataset itself; and so may the descriptor.
    Without `index` no camera or view is known, so the sizes of the side information table do not matter.
    """
    of_weights = card.spec
    here = _spec_here(of_weights, config, index or of_weights)
    faults = [
        f"{source}: {key} is {theirs} in the weights, {ours} in the configuration{note}: set it as it was in training"
        for key, theirs, ours, note in [*_model_differences(of_weights, here), *_pixel_differences(card, config)]
    ]
    if not faults and of_weights.sie_rows != here.sie_rows:
        width = of_weights.arch_config["vision_cfg"]["width"]
        faults.append(
            f"{source}: cv_embed is ({of_weights.sie_rows}, {width}), model.sie {here.sie} on this dataset needs "
            f"({here.sie_rows}, {width}): these weights know other cameras or views, use them on their own dataset"
        )
    if faults:
        raise ConfigError("\n".join(faults))


def _spec_here(of_weights: ModelSpec, config: Config, dataset: ShardIndex | ModelSpec) -> ModelSpec:
    """What the settings say of the model. The architecture's file may be gone: the weights have what was in it."""
    numbers: dict[str, Any] = {"cameras": dataset.cameras, "views": dataset.views}
    arch = config.model.arch
    if arch == of_weights.arch and arch.endswith(".json") and not Path(shipped_file(arch)).exists():
        chosen = {name: getattr(config.model, name) for name in SPEC_SETTINGS}
        return replace(of_weights, **chosen, **numbers)
    return configured_spec(config, **numbers, identities=of_weights.identities, noun=of_weights.noun)


def _model_differences(of_weights: ModelSpec, here: ModelSpec) -> Iterator[tuple[str, object, object, str]]:
    """(key, value in the weights, value in the configuration, note) of what decides the features and differs."""
    if of_weights.arch_config != here.arch_config:
        yield "model.arch", of_weights.arch, here.arch, " (another architecture)"
        return
    width = of_weights.arch_config["vision_cfg"]["width"]
    rows = [1 + spec.grid[0] * spec.grid[1] for spec in (of_weights, here)]
    shapes = f" (positional_embedding ({rows[0]}, {width}) and ({rows[1]}, {width}))" if rows[0] != rows[1] else ""
    values: dict[str, tuple[list[Any], str]] = {
        "model.image_size": ([list(spec.image_size) for spec in (of_weights, here)], shapes),
        "model.stride": ([spec.stride or spec.patch_size for spec in (of_weights, here)], shapes),
        "model.sie": ([of_weights.sie, here.sie], ""),
    }
    if of_weights.sie == here.sie != "none":
        values["model.sie_tokens"] = [of_weights.sie_tokens, here.sie_tokens], ""
        values["model.sie_coefficient"] = [of_weights.sie_coefficient, here.sie_coefficient], ""
    yield from ((key, *pair, note) for key, (pair, note) in values.items() if pair[0] != pair[1])


def _pixel_differences(card: ModelCard, config: Config) -> Iterator[tuple[str, object, object, str]]:
    for key in ("pixel_mean", "pixel_std"):
        theirs, ours = list(getattr(card, key)), list(getattr(config.data, key))
        if theirs != ours:
            yield f"data.{key}", theirs, ours, ""
