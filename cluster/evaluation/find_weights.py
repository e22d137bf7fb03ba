"""Weights to be used: found, and compared with the settings and the dataset; no torch, no weights read.

    --weights RUN | FILE ──▶ [find_weights] ──▶ inference

A file of our own says what it was trained with, so settings that contradict it are refused here. Files of others
(CLIP's, the authors') are compared with the settings when they are read.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from clipreid.errors import ModelError
from clipreid.model.spec import ModelSpec
from clipreid.weights.card import MODEL_FILE, ModelCard, read_card, weights_file
from clipreid.weights.sealed import DamagedError
from cluster.errors import ConfigError
from cluster.settings.config import WEIGHT_SUFFIXES, Config
from cluster.settings.model_spec import configured_spec
from shards.leftovers import remove_leftovers, working_name
from shards.loading.index import ShardIndex
from shards.storage import is_local, join, read_bytes


@contextmanager
def local_weights(weights: str) -> Iterator[Path]:
    """The file behind a run folder or a file, either of them a path or an fsspec URL, while the block runs.

    Raises ModelError or ConfigError where there is none.
    """
    if is_local(weights):
        yield weights_file(Path(weights.removeprefix("file://")).expanduser())
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


def card_of(path: Path) -> ModelCard | None:
    """What the file says about itself; None for a file that is not ours. Raises DamagedError where it was changed."""
    try:
        return read_card(path)
    except DamagedError:
        raise
    except ModelError:
        return None


def check_fits(card: ModelCard, config: Config, index: ShardIndex | None, source: str) -> None:
    """Raises ConfigError, one line a fault with both values, unless weights and settings compute the same features.

    What only training needs may differ: identities, prompts, the dataset itself. So may the descriptor, with a note.
    Without `index` no camera or view is known, so the sizes of the side information table do not matter.
    """
    of_weights = card.spec
    dataset = index or of_weights
    here = configured_spec(
        config, cameras=dataset.cameras, views=dataset.views, identities=of_weights.identities, noun=of_weights.noun
    )
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
    _note_descriptor(card, config, source)


def _note_descriptor(card: ModelCard, config: Config, source: str) -> None:
    """Another descriptor than the run's is a choice that is free at any time, but not to be made unawares."""
    theirs, ours = list(card.descriptor), list(config.eval.descriptor)
    if theirs != ours and os.environ.get("RANK", "0") == "0":
        print(f"note: eval.descriptor is {ours} here, {source} was evaluated by {theirs} in its run", file=sys.stderr)


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
