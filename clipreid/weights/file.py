"""Weights out, and back in: `model.safetensors`, which stands alone.

    stage 2 ──▶ [file] ──▶ model.safetensors ──▶ [file] ──▶ evaluate, extract, export

One file holds the image encoder with necks and classifiers, the text side where there is one, and in its metadata the
card (`card.py`) with all that is needed to use them. Weights of others come in through `pretrained.py` (CLIP) and
`official.py` (the paper's authors).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from clipreid.model.prompts import PromptedText
from clipreid.model.reid import ReIDModel
from clipreid.model.spec import ModelSpec
from clipreid.weights.card import MODEL_FILE, ModelCard, read_card, weights_file
from clipreid.weights.initial import empty_models
from clipreid.weights.pretrained import check_fit
from clipreid.weights.sealed import Stored, dump, read_header

__all__ = ["MODEL_FILE", "ModelCard", "load_model", "load_text", "read_card", "save_model", "weights_file"]

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the safetensors format calls them."""
_TEXT_PREFIXES = ("prompt_learner.", "text_encoder.")
Module = TypeVar("Module", bound=nn.Module)


def save_model(path: str | Path, model: ReIDModel, card: ModelCard, text: PromptedText | None = None) -> None:
    """Write what `model_file` gives to `path`, where it appears only when it is complete."""
    partial = Path(f"{path}.partial")
    with partial.open("wb") as file:
        file.writelines(model_file(model, card, text))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def model_file(model: ReIDModel, card: ModelCard, text: PromptedText | None = None) -> list[memoryview | bytes]:
    """The file of `model`, and of `text` if it is to be exported or trained on later, with their card: in chunks, to
    be written one after the other."""
    state = model.state_dict() | (text.state_dict() if text is not None else {})
    return dump_tensors(state, card.to_metadata())


def dump_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[memoryview | bytes]:
    """A .safetensors file that carries checksums, in chunks. Tensors of the CPU are not copied."""
    return dump({name: _stored(tensor.detach().cpu()) for name, tensor in tensors.items()}, metadata)


def _stored(tensor: Tensor) -> Stored:
    return Stored(TYPES[tensor.dtype], tuple(tensor.shape), bytes_of(tensor))


def bytes_of(tensor: Tensor) -> memoryview:
    """As they lie in memory, or would if they lay in one piece."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def load_model(path: str | Path) -> tuple[ReIDModel, ModelSpec]:
    """The image model of a file written by `save_model`, on the CPU in evaluation mode, and its specification."""
    spec = read_card(path).spec
    model, _ = empty_models(spec)
    return _fill(model, path, text=False).eval(), spec


def load_text(path: str | Path) -> PromptedText | None:
    """The text side of a file written by `save_model`, or None when it was saved without."""
    spec = read_card(path).spec
    with safe_open(path, framework="pt") as file:
        if not any(name.startswith(_TEXT_PREFIXES) for name in file.keys()):  # noqa: SIM118 (not a dict)
            return None
    _, text = empty_models(spec)
    return _fill(text, path, text=True)


def _fill(module: Module, path: str | Path, text: bool) -> Module:
    """Raises DamagedError where the file has other bytes than were written, ModelError where they do not fit."""
    header = read_header(Path(path))
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(_TEXT_PREFIXES) == text]  # noqa: SIM118
        state: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    for name, tensor in state.items():
        header.check(name, bytes_of(tensor))
    check_fit(state, module.state_dict(), str(path))
    module.load_state_dict(state)
    return module
