"""What weights were trained with: the settings of a command that uses them, and what differs from them here.

    RUN/config.yaml, the card of model.safetensors ──▶ [trained] ──▶ settings without --config; one note of differences

The card says it so that a file of weights stands alone. Files of others, and older ones apart from their run, say
nothing: they need --config.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clipreid.weights.card import MODEL_FILE, ModelCard
from cluster.errors import ConfigError
from cluster.run.run_folder import CONFIG
from cluster.run.storage import Storage
from cluster.settings.config import AUTO, WEIGHT_SUFFIXES, Config, ModelSection, flatten
from cluster.settings.paths import with_absolute_paths
from cluster.settings.yaml_file import parse_config, parse_tree, with_overrides
from shards.errors import DataError, masked
from shards.loading.index import ShardIndex
from shards.storage import decoded

USED = {
    "run": ("seed",),
    "data": ("shards", "pixel_mean", "pixel_std"),
    "model": tuple(ModelSection.model_fields),
    "train": ("precision",),
    "eval": ("descriptor", "flip", "rule", "draws", "rerank"),
}
"""Settings that a use of the weights needs to know; how the machines shared the training is none of them."""
FEATURES = ("eval.descriptor", "eval.flip", "train.precision")
"""Free to choose at any time, but not unawares: features differ by them."""
METRICS = (*FEATURES, "eval.rule", "eval.rerank")
"""And metrics by these."""
DRAWS = ("eval.draws", "run.seed")
"""And those of the VehicleID protocol by these."""


def training_facts(config: Config, index: ShardIndex) -> dict[str, Any]:
    """For the card of a run's weights: the dataset that they were trained on, and the settings that a use needs."""
    whole = config.model_dump(mode="json")
    settings = {section: {name: whole[section][name] for name in names} for section, names in USED.items()}
    url = masked(config.data.shards)  # Whoever gets the file gets no password.
    settings["data"]["shards"] = url
    settings["model"]["pretrained"] = None
    if config.method != "two_stage":
        settings |= {"method": whole["method"], "stages": whole["stages"]}
        settings["stage2"] = {"text_loss": whole["stage2"]["text_loss"]}
    dataset = {"name": index.name, "fingerprint": index.fingerprint, "url": url}
    return {"dataset": dataset, "settings": settings}


def trained_precision(card: ModelCard) -> str | None:
    """What the weights were trained in, where their card says so."""
    precision = flatten(card.training.get("settings", {})).get("train.precision")
    return precision if precision in ("float32", "bf16") else None


@dataclass(frozen=True)
class Trained:
    """What is known of the training of some weights."""

    source: str
    """The weights as they were named."""
    settings: dict[str, Any] | None
    """A tree of settings; None where neither run nor card has them."""
    dataset: dict[str, str]
    """Its name, fingerprint and url; empty in older files."""
    descriptor: Sequence[str] | None
    """That of the card."""
    why_not: str = ""
    """Why the settings of the run cannot be read."""

    @classmethod
    def of(cls, weights: str, card: ModelCard | None) -> "Trained":
        """Of a run folder or a file, a path or URL. A run's own settings count more than the card's; a file's less."""
        training = card.training if card else {}
        folder, _, name = weights.rpartition("/")
        of_card, of_run, why_not = training.get("settings"), None, ""
        try:
            if not weights.endswith(WEIGHT_SUFFIXES):
                of_run = _settings_of_run(weights)
            elif card and not of_card and name == MODEL_FILE:
                of_run = _settings_of_run(folder or ".")
        except (ConfigError, DataError, OSError) as error:
            why_not = str(error)
        descriptor = list(card.descriptor) if card else None
        return cls(weights, of_run or of_card, training.get("dataset", {}), descriptor, why_not)

    def config(self, overrides: Sequence[str]) -> Config:
        """The settings for a use of the weights. Raises ConfigError with every fault."""
        if self.settings is None:
            reason = self.why_not or f"{self.source} does not say what it was trained with, as a run folder does"
            raise ConfigError(f"--config: not given, and {reason}: give the settings")
        return with_absolute_paths(parse_config(with_overrides(self.settings, overrides)))

    def note_differences(self, config: Config, index: ShardIndex | None, keys: tuple[str, ...]) -> None:
        """One line on stderr where the dataset or one of these settings is not that of the training.

        index: of the dataset in use, None where there is none.
        """
        if index is not None and "test" in index.splits and keys == METRICS:
            keys = (*keys, *DRAWS)
        parts = [*self._dataset_difference(config, index), *self._setting_differences(config, keys)]
        if parts and os.environ.get("RANK", "0") == "0":
            print(masked(f"note: {'; '.join(parts)}"), file=sys.stderr)

    def _dataset_difference(self, config: Config, index: ShardIndex | None) -> Iterator[str]:
        if index is None:
            return
        theirs = self.dataset or {"url": (self.settings or {}).get("data", {}).get("shards", "")}
        url = masked(config.data.shards)
        same = theirs.get("fingerprint") == index.fingerprint if self.dataset else theirs["url"] == url
        if theirs["url"] and not same:
            name = f"{theirs['name']} ({theirs['url']})" if "name" in theirs else theirs["url"]
            yield f"data.shards is {index.name} ({url}) here, {self.source} was trained on {name}"

    def _setting_differences(self, config: Config, keys: tuple[str, ...]) -> Iterator[str]:
        here, theirs = flatten(config.model_dump(mode="json")), all_settings(self.settings or {})
        if self.descriptor:
            theirs["eval.descriptor"] = list(self.descriptor)
        for key in keys:
            if here[key] != AUTO and here[key] != theirs.get(key, here[key]):
                verb = "trained with" if key.startswith("train.") else "evaluated by"
                yield f"{key} is {here[key]} here, {self.source} was {verb} {theirs[key]} in its run"


def _settings_of_run(weights: str) -> dict[str, Any] | None:
    run = Storage(weights)
    if not run.exists(CONFIG):
        return None
    return parse_tree(decoded(run.read(CONFIG), run.place(CONFIG)), run.place(CONFIG))


def all_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """All settings, flat; those given where they are of another version."""
    try:
        return flatten(parse_config(tree).model_dump(mode="json"))
    except ConfigError:
        return flatten(tree)
