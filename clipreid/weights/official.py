"""Checkpoints of CLIP-ReID's authors (`ViT-B-16_60.pth`, `RN50_120.pth`), in and out.

    ViT-B-16_60.pth ──▶ [official] ──▶ ReIDModel, PromptedText ──▶ evaluation, or stage 2
    model.safetensors ──▶ load_model ──▶ [official] ──▶ a checkpoint that loads into the authors' model

A flat state dict. Our names are the same, but for the prompts' tokens, which are `prompt_learner.cls_ctx` there. It
holds no settings: image size, stride and kind of side information come from the configuration, and where its shapes
contradict them it is refused.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clipreid.errors import ModelError
from clipreid.model.arch import check_activation
from clipreid.model.prompts import PREFIX_POSITIONS, PromptedText
from clipreid.model.spec import ModelSpec
from clipreid.weights.card import ModelCard, read_card
from clipreid.weights.pretrained import read_state_dict, with_batch_counters
from clipreid.weights.sealed import DamagedError

_TOKENS = ("prompt_learner.cls_ctx", "prompt_learner.tokens")
_TEXT_PREFIXES = ("prompt_learner.", "text_encoder.")


@dataclass(frozen=True)
class OfficialShapes:
    """What a checkpoint's shapes tell about the dataset it was trained on."""

    identities: int
    sie_rows: int
    """Rows of its side information table; 0 without one."""


def official_shapes(path: str | Path) -> OfficialShapes:
    """Read what the configuration need not know. Raises ModelError when `path` is no such checkpoint."""
    state = read_state_dict(Path(path))
    if "classifier.weight" not in state:
        raise ModelError(f"{path}: has no classifier.weight: not a checkpoint of CLIP-ReID's authors")
    return OfficialShapes(
        identities=len(state["classifier.weight"]),
        sie_rows=len(state["cv_embed"]) if "cv_embed" in state else 0,
    )


def holds_prompts(path: str | Path) -> bool:
    """Whether the file has every identity's prompt tokens, under the authors' name or ours."""
    return not read_state_dict(Path(path)).keys().isdisjoint(_TOKENS)


def load_official(
    model: nn.Module, text: PromptedText | None, state: dict[str, Tensor], spec: ModelSpec, source: str
) -> PromptedText | None:
    """Fill `model` and `text`, built for `spec`, from a checkpoint's state dict.

    Returns `text`, or None when the checkpoint holds no text side, as a baseline's does, or none is asked for. Raises
    ModelError, one line with both shapes, when position rows, side information, identities or widths do not fit `spec`.
    """
    card = _card(source)
    if card is None:
        _check_activation(spec, source)
    else:
        check_activation(source, bool(card.spec.arch_config.get("quick_gelu")), spec.arch, spec.arch_config)
    state = dict(state)
    if spec.is_resnet:
        state.pop("cv_embed", None)  # made by the authors' code when asked for, but never used by its ResNet
    if _TOKENS[0] in state:
        state[_TOKENS[1]] = state.pop(_TOKENS[0])
    text_state = {name: state.pop(name) for name in list(state) if name.startswith(_TEXT_PREFIXES)}
    _load(model, state, spec, source)
    if not text_state or text is None:
        return None
    _load(text, text_state, spec, source)
    _check_end(text, spec, source)
    return text


def save_official(path: str | Path, model: nn.Module, text: PromptedText | None, spec: ModelSpec) -> None:
    """Write a checkpoint that loads into the authors' model: float32, complete before it appears under its name.

    Without `text` it holds the image side only, which is all that their evaluation uses.
    """
    _check_activation(spec, str(path))
    state = model.state_dict() | (text.state_dict() if text is not None else {})
    state = {name: value.detach().cpu() for name, value in state.items()}
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    if _TOKENS[1] in state:
        state[_TOKENS[0]] = state.pop(_TOKENS[1])
    content = io.BytesIO()  # torch's own writer of files does not say what was refused
    torch.save(state, content)
    partial = Path(f"{path}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _load(module: nn.Module, state: dict[str, Tensor], spec: ModelSpec, source: str) -> None:
    wanted = module.state_dict()
    state = with_batch_counters(state, wanted)
    for name in [*wanted, *sorted(state.keys() - wanted.keys())]:
        here = tuple(wanted[name].shape) if name in wanted else None
        there = tuple(state[name].shape) if name in state else None
        if here != there:
            raise ModelError(
                f"{source}: {_their_name(name)} is {there or 'missing'}, the configuration needs {here or 'none'}: "
                f"{_remedy(name, spec)}"
            )
    module.load_state_dict(state)


def _their_name(name: str) -> str:
    return _TOKENS[0] if name == _TOKENS[1] else name


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


def _card(source: str) -> ModelCard | None:
    """What a file of our own, which has nearly the same names, says about itself."""
    try:
        return read_card(source)
    except DamagedError:
        raise
    except ModelError:
        return None


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
