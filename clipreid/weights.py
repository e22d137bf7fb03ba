"""Weights out, and back in: `model.safetensors`, which stands alone.

    stage 2 -> [weights] -> model.safetensors -> evaluate, extract, export

One file holds the image encoder with necks and classifiers, the text side where there is one, and in its
metadata all that is needed to use them: the ModelSpec with the architecture, the normalisation of pixels, and
the descriptor. Weights of others come in through `pretrained.py` (CLIP) and `official.py` (the paper's
authors).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipreid.errors import ModelError
from clipreid.model import ReIDModel, empty_models
from clipreid.pretrained import check_fit
from clipreid.prompts import PromptedText
from clipreid.spec import ModelSpec

MODEL_FILE = "model.safetensors"
"""Name of the final weights in a run folder."""

_CARD = "clipreid"
_TEXT_PREFIXES = ("prompt_learner.", "text_encoder.")


@dataclass(frozen=True)
class ModelCard:
    """What has to be known to use a file of weights."""

    spec: ModelSpec
    pixel_mean: tuple[float, float, float]
    """Mean of the red, green, blue values in 0..1 that is subtracted before the encoder."""
    pixel_std: tuple[float, float, float]
    """What the rest is divided by."""
    descriptor: tuple[str, ...] = ("img", "proj")
    """Features that images are compared by: any of pre, img, proj."""


def save_model(path: str | Path, model: ReIDModel, card: ModelCard, text: PromptedText | None = None) -> None:
    """Write `model`, and `text` if it is to be exported or trained on later, with their card to `path`.

    The file appears under its name only when it is complete.
    """
    state = model.state_dict() | (text.state_dict() if text is not None else {})
    fields = {
        "spec": card.spec.to_dict(),
        "pixel_mean": list(card.pixel_mean),
        "pixel_std": list(card.pixel_std),
        "descriptor": list(card.descriptor),
    }
    partial = Path(f"{path}.partial")
    contiguous = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(contiguous, partial, metadata={_CARD: json.dumps(fields)})
    partial.replace(path)


def weights_file(weights: str | Path) -> Path:
    """The file behind a run folder or a file of weights. Raises ModelError where there is none."""
    path = Path(weights)
    if path.is_dir():
        path = path / MODEL_FILE
        if not path.is_file():
            raise ModelError(f"{weights}: holds no {MODEL_FILE}: not a run folder, or the run has not finished")
    elif not path.is_file():
        raise ModelError(f"{weights}: no such run folder or file of weights")
    return path


def read_card(path: str | Path) -> ModelCard:
    """The card of a file written by `save_model`, without its weights. Raises ModelError for any other file."""
    path = weights_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ModelError(f"{path}: is not a complete .safetensors file ({error}); copy it again") from None
    if _CARD not in metadata:
        raise ModelError(f"{path}: was not written by this system; for others' weights set model.pretrained")
    fields = json.loads(metadata[_CARD])
    return ModelCard(
        spec=ModelSpec.from_dict(fields["spec"]),
        pixel_mean=tuple(fields["pixel_mean"]),
        pixel_std=tuple(fields["pixel_std"]),
        descriptor=tuple(fields["descriptor"]),
    )


def load_model(path: str | Path) -> tuple[ReIDModel, ModelSpec]:
    """The image model of a file written by `save_model`, on the CPU in evaluation mode, and its specification."""
    spec = read_card(path).spec
    model, _ = empty_models(spec)
    return _fill(model, path, text=False).eval(), spec


def load_text(path: str | Path) -> PromptedText | None:
    """The text side of a file written by `save_model`, or None where it was saved without."""
    spec = read_card(path).spec
    with safe_open(path, framework="pt") as file:
        if not any(name.startswith(_TEXT_PREFIXES) for name in file.keys()):  # noqa: SIM118 (not a dict)
            return None
    _, text = empty_models(spec)
    return _fill(text, path, text=True)


def _fill(module: nn.Module, path: str | Path, text: bool) -> nn.Module:
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(_TEXT_PREFIXES) == text]  # noqa: SIM118
        state: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    check_fit(state, module.state_dict(), str(path))
    module.load_state_dict(state)
    return module
