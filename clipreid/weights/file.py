"""Weights out, and back in: `model.safetensors`, which stands alone.

    stage 2 ──▶ [file] ──▶ model.safetensors ──▶ [file] ──▶ evaluate, extract, export

One file holds the image encoder with its necks, the text side where there is one, the identity tables, and in its
metadata the card (`card.py`) with all that is needed to use them. Weights of others come in through `pretrained.py`
(CLIP) and `official.py` (the paper's authors).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from clipreid.errors import ModelError
from clipreid.identity_table import IdentityTables
from clipreid.model.prompts import PromptedText
from clipreid.model.reid import ReIDModel
from clipreid.model.spec import ModelSpec
from clipreid.weights.appearing import appearing
from clipreid.weights.card import MODEL_FILE, ModelCard, read_card, weights_file
from clipreid.weights.initial import Models, empty_models
from clipreid.weights.pretrained import check_fit
from clipreid.weights.sealed import Place, Stored, check_file, check_tensor, dump, read_header, read_pieces
from clipreid.weights.tables import CLASSIFIER, CLASSIFIER_PROJ, STD, TOKENS, load_table
from clipreid.weights.types import bytes_of, stored

__all__ = [
    "MODEL_FILE",
    "ModelCard",
    "load_model",
    "load_models",
    "load_state",
    "load_text",
    "read_card",
    "save_model",
    "weights_file",
    "with_decision",
]

_TEXT_PREFIXES = ("prompt_learner.", "text_encoder.")
Module = TypeVar("Module", bound=nn.Module)


def save_model(path: str | Path, models: Models, card: ModelCard) -> None:
    """Write all of `models`, whose tables are whole, to `path`, where it appears only when it is complete."""
    with appearing(Path(path)) as file:
        file.writelines(model_file(models, card, {table.name: stored(table.block) for table in models.tables}))


def model_file(models: Models, card: ModelCard, tables: Mapping[str, Stored]) -> Iterator[memoryview | bytes]:
    """The file of `models` with these whole tables, and their card: in pieces, to be written one after the other."""
    state = {name: stored(tensor) for name, tensor in models.state_dict().items()}
    return dump(state | dict(tables), card.to_metadata())


def with_decision(path: str | Path, decision: dict[str, Any]) -> Iterator[memoryview | bytes]:
    """Such a file with this decision in its card and the same tensors, in pieces. Raises DamagedError while it is read
    where it has other bytes than were written."""
    path = weights_file(path)
    card = replace(read_card(path), decision=decision)
    header = read_header(path)
    with path.open("rb") as file:
        for name in header.places:
            check_tensor(file, header, name)

        def tensor(place: Place) -> Stored:
            return Stored(place.dtype, place.shape, lambda: read_pieces(file, place.start, place.end))

        yield from dump({name: tensor(place) for name, place in header.places.items()}, card.to_metadata())


def load_model(path: str | Path) -> tuple[ReIDModel, ModelSpec]:
    """The image model of a run folder or of a file written by `save_model`, on the CPU in evaluation mode, and its
    specification. Its classifiers stay in the file: `tables.load_table` reads them."""
    path = weights_file(path)
    spec = read_card(path).spec
    model, _ = empty_models(spec)
    return _fill(model, path).eval(), spec


def load_text(path: str | Path) -> PromptedText | None:
    """The text side of a run folder or of such a file, or None when it was saved without. The tokens of its identities
    are a table."""
    path = weights_file(path)
    if not any(name.startswith(_TEXT_PREFIXES) and name not in STD for name in read_header(path).places):
        return None
    _, text = empty_models(read_card(path).spec)
    return _fill(text, path)


def load_models(path: str | Path) -> Models:
    """All of a run folder or of such a file, with whole tables."""
    model, text = load_model(path)[0], load_text(path)
    classifier, classifier_proj, tokens = (load_table(path, name) for name in (CLASSIFIER, CLASSIFIER_PROJ, TOKENS))
    if classifier is None or classifier_proj is None:
        raise ModelError(f"{path}: holds no classifiers: give the model.safetensors of a run")
    return Models(model, text, IdentityTables(classifier, classifier_proj, tokens))


def load_state(path: str | Path) -> dict[str, Tensor]:
    """All tensors of such a file, mapped into memory and checked as they are read."""
    path = weights_file(path)
    with path.open("rb") as file:
        check_file(file, path.stat().st_size, str(path))
    return load_file(path)


def _fill(module: Module, path: Path) -> Module:
    """Raises DamagedError where the file has other bytes than were written, ModelError where they do not fit."""
    header, wanted = read_header(path), module.state_dict()
    own = {name.split(".")[0] for name in wanted}
    with safe_open(path, framework="pt") as file:
        names = [name for name in header.places if name.split(".")[0] in own and name not in STD]
        state: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    for name, tensor in state.items():
        header.check(name, [bytes_of(tensor)])
    check_fit(state, wanted, str(path))
    module.load_state_dict(state)
    return module
