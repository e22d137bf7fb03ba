"""Weights out, and back in: `model.safetensors`, which stands alone.

    stage 2 ──▶ [file] ──▶ model.safetensors ──▶ [file] ──▶ evaluate, extract, export

One file holds the image encoder with necks and classifiers, the text side where there is one, and in its metadata the
card (`card.py`) with all that is needed to use them. Weights of others come in through `pretrained.py` (CLIP) and
`official.py` (the paper's authors).
"""

from pathlib import Path
from typing import TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipreid.model.prompts import PromptedText
from clipreid.model.reid import ReIDModel
from clipreid.model.spec import ModelSpec
from clipreid.weights.card import MODEL_FILE, ModelCard, read_card, weights_file
from clipreid.weights.initial import empty_models
from clipreid.weights.pretrained import check_fit

__all__ = ["MODEL_FILE", "ModelCard", "load_model", "load_text", "read_card", "save_model", "weights_file"]

_TEXT_PREFIXES = ("prompt_learner.", "text_encoder.")
Module = TypeVar("Module", bound=nn.Module)


def save_model(path: str | Path, model: ReIDModel, card: ModelCard, text: PromptedText | None = None) -> None:
    """Write `model`, and `text` if it is to be exported or trained on later, with their card to `path`.

    The file appears under its name only when it is complete.
    """
    state = model.state_dict() | (text.state_dict() if text is not None else {})
    partial = Path(f"{path}.partial")
    contiguous = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(contiguous, partial, metadata=card.to_metadata())
    partial.replace(path)


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
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(_TEXT_PREFIXES) == text]  # noqa: SIM118
        state: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    check_fit(state, module.state_dict(), str(path))
    module.load_state_dict(state)
    return module
