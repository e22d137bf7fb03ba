"""Checkpoints of CLIP-ReID's authors (`ViT-B-16_60.pth`, `RN50_120.pth`), in and out.

    ViT-B-16_60.pth ──▶ [official] ──▶ ReIDModel, PromptedText ──▶ evaluation, or stage 2
    model.safetensors ──▶ load_model ──▶ [official] ──▶ a checkpoint that loads into the authors' model

A flat state dict. Our names are the same, but for the prompts' tokens, which are `prompt_learner.cls_ctx` there. It
holds no settings: image size, stride and kind of side information come from the configuration, and where its shapes
contradict them it is refused.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipreid.errors import ModelError
from clipreid.model.arch import check_activation
from clipreid.model.prompts import PREFIX_POSITIONS, PromptedText
from clipreid.model.reid import ReIDModel
from clipreid.model.spec import ModelSpec
from clipreid.weights.appearing import appearing
from clipreid.weights.card import find_card
from clipreid.weights.pretrained import read_state_dict, with_batch_counters
from clipreid.weights.tables import CLASSIFIER, TOKENS, table_shapes

_THEIR_TOKENS = "prompt_learner.cls_ctx"
_TEXT_PREFIXES = ("prompt_learner.", "text_encoder.")


@dataclass(frozen=True)
class OfficialShapes:
    """What a checkpoint's shapes tell about the dataset it was trained on."""

    identities: int
    sie_rows: int
    """Rows of its side information table; 0 without one."""


def official_shapes(state: Mapping[str, Tensor], source: str) -> OfficialShapes:
    """What the configuration need not know. Raises ModelError when `state` is of no such checkpoint."""
    if CLASSIFIER not in state:
        raise ModelError(f"{source}: has no classifier.weight: not a checkpoint of CLIP-ReID's authors")
    return OfficialShapes(
        identities=len(state[CLASSIFIER]),
        sie_rows=len(state["cv_embed"]) if "cv_embed" in state else 0,
    )


def holds_prompts(path: str | Path) -> bool:
    """Whether the file has every identity's prompt tokens, under the authors' name or ours."""
    return not read_state_dict(Path(path)).keys().isdisjoint((TOKENS, _THEIR_TOKENS))


def image_side(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What features are computed with, and the classifiers; no prompts, which are of a dataset and its noun."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(_TEXT_PREFIXES)}


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prompts' tokens under our name."""
    return {TOKENS if name == _THEIR_TOKENS else name: tensor for name, tensor in state.items()}


def load_official(
    model: ReIDModel, text: PromptedText, state: Mapping[str, Tensor], spec: ModelSpec, source: str
) -> PromptedText | None:
    """Fill `model` and `text`, built for `spec`, from a checkpoint's state dict; the tables' rows are only compared.

    Returns `text`, or None when the checkpoint holds no text side, as a baseline's does. Raises ModelError, one line
    with both shapes, when position rows, side information, identities or widths do not fit `spec`.
    """
    card = find_card(source)  # a file of our own has nearly the same names
    if card is None:
        _check_activation(spec, source)
    else:
        check_activation(source, bool(card.spec.arch_config.get("quick_gelu")), spec.arch, spec.arch_config)
    state = renamed(state)
    if spec.is_resnet:
        state.pop("cv_embed", None)  # made by the authors' code when asked for, but never used by its ResNet
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wanted |= table_shapes(spec, model, text)
    if has_text := any(name.startswith(_TEXT_PREFIXES) for name in state):
        wanted |= {name: tuple(value.shape) for name, value in text.state_dict().items()}
    else:
        del wanted[TOKENS]
    state = with_batch_counters(state, model.state_dict())
    _check_shapes(state, wanted, spec, source)
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    if not has_text:
        return None
    text.load_state_dict({name: state[name] for name in text.state_dict()})
    _check_end(text, spec, source)
    return text


def save_official(path: str | Path, state: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Write a checkpoint that loads into the authors' model: float32, complete before it appears under its name.

    state: as a file of ours has it. Without a text side it holds the image side only, which is all that the authors'
    evaluation uses.
    """
    _check_activation(spec, str(path))
    theirs = {_their_name(name): value.float() if value.is_floating_point() else value for name, value in state.items()}
    content = io.BytesIO()  # torch's own writer of files does not say what was refused
    torch.save(theirs, content)
    with appearing(Path(path)) as file:
        file.write(content.getbuffer())


def _check_shapes(
    state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], spec: ModelSpec, source: str
) -> None:
    for name in [*wanted, *sorted(state.keys() - wanted.keys())]:
        here, there = wanted.get(name), tuple(state[name].shape) if name in state else None
        if here != there:
            raise ModelError(
                f"{source}: {_their_name(name)} is {there or 'missing'}, the configuration needs {here or 'none'}: "
                f"{_remedy(name, spec)}"
            )


def _their_name(name: str) -> str:
    return _THEIR_TOKENS if name == TOKENS else name


def _remedy(name: str, spec: ModelSpec) -> str:
    height, width = spec.image_size
    if name.startswith("image_encoder") and name.endswith("positional_embedding"):
        rows, columns = spec.grid
        return (
            f"model.image_size {height}x{width} with stride {spec.stride or spec.patch_size} is a grid of "
            f"{rows}x{columns}; set both as they were in training"
        )
    if name == "cv_embed":
        return (
            f"model.sie is {spec.sie} for {spec.cameras} cameras and {spec.views} views; set it as it was in training"
        )
    if name.startswith(("classifier", "prompt_learner.")):
        return (
            f"it is for other training data than the {spec.identities} identities (and model.prompt_tokens "
            f"{spec.prompt_tokens}) configured here"
        )
    return f"it is of another architecture than model.arch {spec.arch}"


def _check_activation(spec: ModelSpec, source: str) -> None:
    """The authors' model computes QuickGELU; a file of one of our own small models may hold another."""
    if not spec.arch.endswith(".json"):
        check_activation(source, True, spec.arch, spec.arch_config)


def _check_end(text: PromptedText, spec: ModelSpec, source: str) -> None:
    """The noun is not in the file, but its length is: behind the end token all rows are the padding's."""
    suffix = text.prompt_learner.token_suffix[0]
    words = int((suffix != suffix[-1]).any(dim=1).sum())
    end = PREFIX_POSITIONS + spec.prompt_tokens + words - 1
    if end != text.prompt_learner.length - 1:
        raise ModelError(
            f"{source}: its prompts end at position {end}, those for noun {spec.noun!r} at position "
            f"{text.prompt_learner.length - 1}: pack the dataset with the noun it was trained with"
        )
