"""A trained model in a program: images in, descriptors out, the same as `launch/extract.py` writes.

    RUN | FILE | URL ──▶ [load] ──▶ ReID ──encode──▶ float32 [n, D]
                                         ──describe──▶ text features of training identities

Beside what extraction does there is one way more to hand over images (`pixels.py`); decoding, resizing, the shape of a
forward pass and the encoder are the same code, so features are equal bit by bit.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from os import PathLike, fspath
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from clipreid.errors import ModelError
from clipreid.identity_table import IdentityTable
from clipreid.model.prompts import PromptedText
from clipreid.model.reid import ReIDModel
from clipreid.weights.card import ModelCard
from cluster.errors import ConfigError
from cluster.evaluation.evaluate import descriptors
from cluster.evaluation.features import encode_batches
from cluster.evaluation.find_weights import Weights, check_fits, local_weights, open_weights
from cluster.evaluation.inference import Inference, load_prompts
from cluster.library.pixels import Images, batches
from cluster.ranks.team import Team
from cluster.run.run_folder import STAGE1_RESULT
from cluster.settings.config import WEIGHT_SUFFIXES, Config
from cluster.settings.paths import expanded, with_absolute_paths
from cluster.settings.yaml_file import load_config
from cluster.training.stage1_result import Stage1Result
from shards.errors import DataError
from shards.loading.index import ShardIndex
from shards.loading.sequential import ImageBatch
from shards.storage import join

Numbers = int | Sequence[int] | np.ndarray | Tensor | None
"""Cameras or views: one for all images, or one an image; -1 and None are unknown."""


def load(
    weights: str | PathLike[str],
    *settings: str,
    config: str | PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> "ReID":
    """The model of a run folder or of a file of weights, either a path or a URL that fsspec reads.

    settings: `key.path=value` as on the command line, such as "eval.flip=true" or "eval.descriptor=[proj]".
    config: a settings file, for weights that do not say what they were trained with: those of the authors, CLIP's.
    device: by default the GPU where there is one.
    Raises ModelError, ConfigError or DataError, each a ValueError of one line.
    """
    name = expanded(fspath(weights))
    with open_weights(name) as found:
        chosen = _settings(found, settings, config)
        if found.card:
            check_fits(found.card, chosen, None, name)
        index = None if found.card else _training_data(chosen)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        inference = Inference(chosen, found.path, found.card, index, Team(device=place))
        return ReID(name, inference.model, inference.config, found.card, index)


def _settings(found: Weights, settings: Sequence[str], config: str | PathLike[str] | None) -> Config:
    if config is not None:
        return with_absolute_paths(load_config(expanded(fspath(config)), settings))
    if found.trained.settings is None:
        why = found.trained.why_not or f"{found.trained.source} does not say what it was trained with"
        raise ConfigError(f"config: not given, and {why}: give config=FILE.yaml")
    return found.trained.config(settings)


def _training_data(config: Config) -> ShardIndex | None:
    """What knows how many cameras and views others' weights were trained with, where it is at hand."""
    if config.model.sie == "none":
        return None
    try:
        return ShardIndex.open(config.data.shards, config.data.cache_dir)
    except DataError:
        return None


class ReID:
    """Weights at work in this process; made by `load`."""

    def __init__(self, source: str, model: ReIDModel, config: Config, card: ModelCard | None, index: ShardIndex | None):
        self.source = source
        """The weights as they were named."""
        self.model = model
        """In evaluation mode, on its device."""
        self.config = config
        """The settings in use, of which `eval.descriptor`, `eval.flip` and `train.precision` decide the features."""
        self.card = card
        """What the weights say of themselves; None for those of others."""
        self._index = index

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """D, values of a descriptor."""
        widths = dict(zip(("pre", "img", "proj"), self.model.image_encoder.widths, strict=True))
        return sum(widths[name] for name in self.config.eval.descriptor)

    def to(self, device: str | torch.device) -> Self:
        """Moves the model; what is encoded from now on is encoded there."""
        self.model.to(device)
        return self

    def encode(
        self,
        images: Images,
        cameras: Numbers = None,
        views: Numbers = None,
        batch_size: int | None = None,
        device: str | torch.device | None = None,
    ) -> np.ndarray:
        """Descriptors, float32 [n, D] of length 1, of n images in their order.

        images: a path or URL, a PIL image, a uint8 array or tensor ([H, W, 3], [3, H, W], or n of them), a list or an
        iterator of these, which is read as it is needed, or a folder, whose order is that of `list_images`.
        cameras, views: for weights with side information; unknown ones add none.
        batch_size: images of one pass (default `eval.batch`). Another number rounds differently on a GPU, and on a CPU
        where it is below 16.
        device: as `to`.
        Raises DataError for an image that cannot be read, or where cameras or views are not one an image.
        """
        if device is not None:
            self.to(device)
        size = self.config.eval.batch if batch_size is None else batch_size
        if size < 1:
            raise DataError(f"batch_size is {size}: give at least 1")
        numbers = self._side_information(cameras, views)

        def encode(pixels: Tensor, rows: Tensor) -> Tensor:
            return descriptors(self.model, self.config, pixels, *(each.of(rows) for each in numbers))

        read = batches(images, self.config.model.image_size, size, self.config.data.loaders)
        pieces = encode_batches(encode, _one_each(read, numbers), size, self.device, lambda done: None)
        features = [piece for _, piece in pieces]
        return torch.cat(features).numpy() if features else np.zeros((0, self.width), np.float32)

    def _side_information(self, cameras: Numbers, views: Numbers) -> list["_PerImage"]:
        """Of cameras and views; none where neither is given, or the weights know of none."""
        if self.model.cv_embed is None or (cameras is None and views is None):
            return []
        if self.card is None and self._index is None and self.model.sie == "camera+view":
            raise ConfigError(
                f"{self.source} does not say how many views it knows: set data.shards= to the dataset that it was "
                "trained on, or give neither cameras nor views"
            )
        return [_PerImage.of_values(name, values) for name, values in (("cameras", cameras), ("views", views))]

    def describe(self, identity: int | str | Sequence[int | str]) -> np.ndarray:
        """Text features of training identities, float32 [D'] of one, [n, D'] of several; not scaled to length 1.

        What stage 1 learned to say of them, in the space of the feature `proj`. identity: a label 0 … N-1, or the
        name that the dataset gives it, where the weights lie in their run folder. Raises ModelError without a text
        side, and for an identity that is none.
        """
        text, tokens = self._prompts
        single = isinstance(identity, int | str | np.integer)
        chosen: Any = [identity] if single else identity
        labels = [self._label(one, tokens.num_identities) for one in chosen]
        with torch.no_grad():
            features = text.to(self.device)(tokens.block[labels].to(self.device)).float().cpu().numpy()
        return features[0] if single else features

    @cached_property
    def _prompts(self) -> tuple[PromptedText, IdentityTable]:
        with local_weights(self.source) as path:
            found = load_prompts(self.config, path, self.card, self._index)
        if found is None:
            raise ModelError(f"{self.source}: holds no prompts, so it has no text features of identities")
        return found[0].eval(), found[1]

    def _label(self, identity: int | str, count: int) -> int:
        label = self._labels.get(identity, -1) if isinstance(identity, str) else int(identity)
        if not 0 <= label < count:
            hint = "" if self._labels else f"; its names are in {STAGE1_RESULT} of the run, which is not beside it"
            raise ModelError(f"identity {identity!r}: {self.source} was trained on labels 0 ... {count - 1}{hint}")
        return label

    @cached_property
    def _labels(self) -> dict[str, int]:
        """By the identities' names, which stage 1 wrote down; empty where its result is not there."""
        folder = self.source.rpartition("/")[0] or "." if self.source.endswith(WEIGHT_SUFFIXES) else self.source
        try:
            names = Stage1Result.read(join(folder, STAGE1_RESULT)).label_names
        except OSError:
            return {}
        return {name: label for label, name in enumerate(names)}


class _PerImage(NamedTuple):
    """A number for each image."""

    name: str
    values: Tensor
    """int64 [n], or [] of one that all have."""

    @classmethod
    def of_values(cls, name: str, values: Numbers) -> Self:
        found = torch.as_tensor(-1 if values is None else values)
        if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.ndim > 1:
            raise DataError(f"{name}: {found.dtype} {tuple(found.shape)}; give one whole number, or one an image")
        return cls(name, found.long())

    def of(self, rows: Tensor) -> Tensor:
        values = self.values.to(rows.device)
        return values[rows] if values.ndim else values.expand(len(rows))


def _one_each(read: Iterator[ImageBatch], numbers: Sequence[_PerImage]) -> Iterator[ImageBatch]:
    """The batches, whose images are as many as there are numbers for. Raises DataError."""
    count = 0
    for batch in read:
        count += len(batch.rows)
        for name, values in numbers:
            if values.ndim and len(values) < count:
                raise DataError(f"{name}: {len(values)} for more images than that: give one an image")
        yield batch
    for name, values in numbers:
        if values.ndim and len(values) != count:
            raise DataError(f"{name}: {len(values)} for {count} images: give one an image")
