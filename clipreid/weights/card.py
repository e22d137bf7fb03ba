"""What a file of weights says about itself, read without its weights and without torch.

    model.safetensors ──▶ [card] ──▶ load_model; checks of a configuration before anything heavy is imported

The metadata of the file holds the ModelSpec with the architecture, the normalisation of pixels, the descriptor, and
what whoever trained it says of that.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipreid.errors import ModelError
from clipreid.model.spec import FeatureName, ModelSpec
from clipreid.weights.sealed import DamagedError, read_header

MODEL_FILE = "model.safetensors"
"""Name of the final weights in a run folder."""

_CARD = "clipreid"


@dataclass(frozen=True)
class ModelCard:
    """What has to be known to use a file of weights."""

    spec: ModelSpec
    pixel_mean: tuple[float, float, float]
    """Mean of the red, green, blue values in 0..1 that is subtracted before the encoder."""
    pixel_std: tuple[float, float, float]
    """What the rest is divided by."""
    descriptor: tuple[FeatureName, ...]
    """Features that images are compared by."""
    training: dict[str, Any] = field(default_factory=dict)
    """What its trainer has to say of dataset and settings, as JSON; not read here. Empty in older files."""
    decision: dict[str, Any] = field(default_factory=dict)
    """What an open-set evaluation has found: from which distance on, and how probably, two images are of one identity,
    and what it was measured on, as JSON. Empty where none was kept."""

    def to_metadata(self) -> dict[str, str]:
        """As the metadata of a .safetensors file; `read_card` reads it back."""
        fields = {
            "spec": self.spec.to_dict(),
            "pixel_mean": list(self.pixel_mean),
            "pixel_std": list(self.pixel_std),
            "descriptor": list(self.descriptor),
        }
        if self.training:
            fields["training"] = self.training
        if self.decision:
            fields["decision"] = self.decision
        return {_CARD: json.dumps(fields)}


def weights_file(weights: str | Path) -> Path:
    """The file behind a run folder or a file of weights. Raises ModelError when there is none."""
    path = Path(weights)
    if path.is_dir():
        path = path / MODEL_FILE
        if not path.is_file():
            raise ModelError(f"{weights}: holds no {MODEL_FILE}: not a run folder, or the run has not finished")
    elif not path.is_file():
        raise ModelError(f"{weights}: no such run folder or file of weights")
    return path


def local_file(pretrained: str) -> Path | None:
    """The file that `model.pretrained` names: itself or that of a run folder; None where it is the tag of weights that
    open_clip fetches. Raises ModelError for a folder that is no run's."""
    path = Path(pretrained)
    if path.is_file():
        return path
    is_run = path.is_dir() and ("/" in pretrained or (path / MODEL_FILE).is_file())
    return weights_file(path) if is_run else None


def find_card(path: str | Path) -> ModelCard | None:
    """As `read_card`; None for a file that is not ours. Raises DamagedError where it was changed."""
    try:
        return read_card(path)
    except DamagedError:
        raise
    except ModelError:
        return None


def read_card(path: str | Path) -> ModelCard:
    """The card of a file written by `save_model`, without its weights. Raises ModelError when it is any other file, and
    DamagedError where the card is none."""
    path = weights_file(path)
    metadata = read_header(path).metadata
    if _CARD not in metadata:
        raise ModelError(f"{path}: was not written by this system; for others' weights set model.pretrained")
    try:
        return _card_of(json.loads(metadata[_CARD]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ModelError):  # a ValueError with a line of its own: sizes that do not fit
            raise
        raise DamagedError(f"{path}: its card is not as this system writes it ({error!r}): copy it again") from None


def _card_of(fields: Any) -> ModelCard:
    training, decision = fields.get("training", {}), fields.get("decision", {})
    if not all(isinstance(part, dict) for part in (training, decision, *training.values())):
        raise TypeError("training, decision")
    return ModelCard(
        spec=ModelSpec.from_dict(fields["spec"]),
        pixel_mean=tuple(fields["pixel_mean"]),
        pixel_std=tuple(fields["pixel_std"]),
        descriptor=tuple(fields["descriptor"]),
        training=training,
        decision=decision,
    )


def read_metadata(content: bytes) -> dict[str, Any]:
    """The metadata of a .safetensors file that was read whole, or its beginning, where all of it is JSON as in ours."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    return {name: json.loads(text) for name, text in metadata.items()}
