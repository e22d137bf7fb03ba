"""What can be known to be wrong before any worker starts: paths, dataset, model name, sizes, earlier checkpoints.

    Config ──▶ [before_run] ──▶ launcher, or one ConfigError with every fault

Reads the dataset's index and the model's name; torch is loaded only to look up a tag or to try a file of weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clipreid.errors import ModelError
from clipreid.model.arch import check_tag
from clipreid.model.spec import ModelSpec
from clipreid.weights.card import local_file
from clipreid.weights.sealed import check_file
from cluster.checks.may_continue import check_may_continue
from cluster.errors import ConfigError
from cluster.settings.config import Config
from cluster.settings.model_spec import model_spec
from cluster.settings.paths import shipped_file
from shards.errors import DataError
from shards.loading.index import ShardIndex
from shards.storage import open_read, size_bytes

if TYPE_CHECKING:
    from clipreid.weights.transfer import Origin


@dataclass(frozen=True)
class Checked:
    """What a run is made of."""

    index: ShardIndex
    spec: ModelSpec
    origin: "Origin | None"
    """What of the model comes from a checkpoint; None without one."""


def check_run(config: Config) -> Checked:
    """The dataset, and the model to train on it. Raises ConfigError with every fault found, one line each."""
    index = _open_index(config)
    faults = [*_split_faults(index, config), *_identity_faults(index, config), *_batch_faults(index, config)]
    if 2 in config.stages:
        faults += _protocol_faults(index, config)
    try:
        spec = model_spec(config, index)
        faults += _micro_batch_faults(config, spec)
        origin = _check_weights(config, spec, index)
    except ModelError as error:
        faults.append(str(error))
    result = config.stage1.result
    if result:
        faults += _stage1_result_faults(result)
    if faults:
        raise ConfigError("\n".join(faults))
    check_may_continue(config, index.fingerprint)
    _fetch_weights(config)
    return Checked(index, spec, origin)


def check_evaluation(config: Config) -> ShardIndex:
    """The dataset, which has images of known identity in the splits of evaluation. Raises ConfigError, also for
    settings of evaluation that the dataset's protocol has no use for."""
    index = _with_splits(config, _evaluation_splits)
    if faults := [*_protocol_faults(index, config), *_nothing_to_evaluate(index, config)]:
        raise ConfigError("\n".join(faults))
    return index


def check_split(config: Config, split: str) -> ShardIndex:
    """The dataset, which has images in that split. Raises ConfigError."""
    return _with_splits(config, lambda index: [split])


def _with_splits(config: Config, wanted: Callable[[ShardIndex], list[str]]) -> ShardIndex:
    index = _open_index(config)
    if faults := list(_absent_splits(index, config, wanted(index))):
        raise ConfigError("\n".join(faults))
    return index


def _evaluation_splits(index: ShardIndex) -> list[str]:
    return ["test"] if "test" in index.splits else ["query", "gallery"]


def _micro_batch_faults(config: Config, spec: ModelSpec) -> Iterator[str]:
    if config.train.micro_batch and 2 in config.stages and spec.is_resnet:
        yield (
            f"train.micro_batch: {config.train.micro_batch}, but {spec.arch} is a ResNet, whose BatchNorm has to see "
            "the whole batch: leave it out, and use more workers where memory is short"
        )


def _check_weights(config: Config, spec: ModelSpec, index: ShardIndex) -> "Origin | None":
    """Raises ModelError where model.pretrained is neither a file or run nor a known tag, or a file that does not fit or
    lacks the prompts it needs."""
    if config.model.pretrained is None:
        return None
    pretrained = shipped_file(config.model.pretrained)
    path = local_file(pretrained)
    if path is None:
        check_tag(pretrained, config.model.arch, spec.arch_config)
        return None
    from clipreid.peers import Alone
    from clipreid.weights.initial import start  # Loads torch, which only weights in a file need here.

    one_row_each = Alone(world_size=spec.identities)  # Whether the file fits is seen without all identities' rows.
    models, origin = start(spec, pretrained, peers=one_row_each, dataset=index.fingerprint)
    if config.method == "baseline":
        return origin
    if models.text is None:
        raise ModelError(
            f"model.pretrained: {pretrained} has no text side, which method {config.method} needs: give CLIP's weights "
            "or a checkpoint with prompts, or set method=baseline stages=[2] stage2.text_loss=none"
        )
    needs_prompts = config.method == "two_stage" and config.stages == (2,) and not config.stage1.result
    if needs_prompts and not (origin and origin.prompts):
        held = "prompts of other identities alone" if origin else "no prompts"
        raise ModelError(
            f"model.pretrained: {pretrained} holds {held}: name a stage1.safetensors as stage1.result, or train "
            "them with stages=[1,2]"
        )
    return origin


def _fetch_weights(config: Config) -> None:
    """Once, before workers start, who would each ask for them. Raises ConfigError where they cannot be had."""
    pretrained = config.model.pretrained
    if pretrained is None or local_file(shipped_file(pretrained)):
        return
    from clipreid.weights.download import fetch

    try:
        fetch(pretrained, config.model.arch)
    except ModelError as error:
        raise ConfigError(str(error)) from None


def _stage1_result_faults(result: str) -> Iterator[str]:
    try:
        with open_read(result) as file:
            check_file(file, size_bytes(result), result)
    except (FileNotFoundError, NotADirectoryError):
        yield f"stage1.result: {result}: no such file; it is written by stage 1 as RUN/stage1.safetensors"
    except (OSError, ModelError) as error:
        yield f"stage1.result: {error}"


def _open_index(config: Config) -> ShardIndex:
    try:
        return ShardIndex.open(config.data.shards, config.data.cache_dir)
    except DataError as error:
        raise ConfigError(f"data.shards: {error}") from None


def _split_faults(index: ShardIndex, config: Config) -> Iterator[str]:
    wanted = ["train", *(_evaluation_splits(index) if 2 in config.stages else [])]
    yield from _absent_splits(index, config, wanted)


def _absent_splits(index: ShardIndex, config: Config, wanted: list[str]) -> Iterator[str]:
    for split in wanted:
        if not index.splits.get(split, {}).get("images"):
            filled = ", ".join(name for name, facts in index.splits.items() if facts["images"])
            yield (
                f"data.shards: {config.data.shards} has no images in split {split}, only in {filled}: "
                "pack the dataset with it"
            )


def _identity_faults(index: ShardIndex, config: Config) -> Iterator[str]:
    if "train" in index.split_names:
        train = index.split("train")
        unknown = np.flatnonzero(train.identity_codes < 0)
        if len(unknown):
            yield (
                f"data.shards: {config.data.shards} has {len(unknown):,} training images without an identity, "
                f"{train.where(unknown[0])} for one: pack the dataset without them"
            )
    if 2 in config.stages:
        yield from _nothing_to_evaluate(index, config)


def _nothing_to_evaluate(index: ShardIndex, config: Config) -> Iterator[str]:
    for split in set(_evaluation_splits(index)) & set(index.split_names):
        if (index.split(split).identity_codes < 0).all():
            yield (
                f"data.shards: {config.data.shards} knows no identity of split {split}, so there is nothing to "
                "evaluate: pack the dataset with identities"
            )


def _protocol_faults(index: ShardIndex, config: Config) -> Iterator[str]:
    if "test" not in index.splits:
        return
    why = f"has no effect on {index.name}, which is evaluated by the VehicleID protocol"
    if config.eval.rerank:
        yield f"eval.rerank: {list(config.eval.rerank)} {why}, without re-ranking: set eval.rerank=null"
    if config.eval.rule == "camera_time":
        yield f"eval.rule: camera_time {why}, whose rule is none: set eval.rule=none"


def _batch_faults(index: ShardIndex, config: Config) -> Iterator[str]:
    train = index.splits.get("train", {})
    identities, images = train.get("identities", 0), train.get("images", 0)
    if 2 in config.stages and 0 < identities < config.stage2.identities:
        yield (
            f"stage2.identities: {config.stage2.identities} identities per batch, but {index.name} has {identities} "
            f"for training: set stage2.identities to at most {identities}"
        )
    least = min(config.allowed_workers(), default=1) if config.cluster.launcher == "ray" else 1
    if 1 in config.stages and 0 < images < least:
        yield f"cluster.workers: {least} workers, but {index.name} has only {images} training images"
