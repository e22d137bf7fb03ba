"""What a run takes over from a re-identification checkpoint, ours or the authors', and what begins anew.

    checkpoint, ModelSpec ──▶ [transfer] ──▶ the state that fits, and what is told of it ──▶ initial

Encoders and necks are of images as such and have to fit. Side information is of cameras and views, and is kept for
those that the new dataset has too. Classifiers and prompts are of identities: they are kept for the same ones only.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from clipreid.model.spec import ModelSpec
from clipreid.weights.card import ModelCard, find_card
from clipreid.weights.official import official_shapes
from clipreid.weights.tables import TOKENS

SIE = "cv_embed"


@dataclass(frozen=True)
class Origin:
    """Where the parts of a model come from, for a person to read."""

    source: str
    """As `model.pretrained` names it."""
    kept: tuple[str, ...]
    anew: tuple[str, ...]
    left_out: tuple[str, ...]
    prompts: bool
    """Whether prompts of the training identities were kept."""

    def __str__(self) -> str:
        parts = (("kept", self.kept), ("begins anew", self.anew), ("left out", self.left_out))
        return f"from {self.source}: " + "; ".join(f"{name}: {', '.join(what)}" for name, what in parts if what)


@dataclass(frozen=True)
class Transfer:
    """A checkpoint's state as a run of `spec` can begin with it."""

    state: dict[str, Tensor]
    """By its own names; side information fits `spec`, and is absent where it begins anew."""
    identities: int
    """That its tables are of."""
    same_identities: bool
    """Whether these are those of the dataset to train on."""
    sie_kept: int
    """Rows of side information that come from the checkpoint."""
    sie_left_out: int
    """Rows of it that do not."""

    def origin(self, source: str, spec: ModelSpec, has_text: bool) -> Origin:
        """What is told when the checkpoint's other parts were found to fit."""
        kept, anew = ["image encoder and necks"], []
        tables = f"classifiers{' and prompts' * has_text} of {spec.identities:,} identities"
        if has_text:
            kept.append(f"text encoder, whose prompts say {spec.noun!r}")
        if self.same_identities:
            kept.append(tables)
        else:
            anew.append(f"{tables} (those of the weights are of {self.identities:,} others)")
        if self.sie_kept:
            kept.append(f"side information in {self.sie_kept:,} of {spec.sie_rows:,} rows")
        if self.sie_kept < spec.sie_rows:
            anew.append(f"side information in {spec.sie_rows - self.sie_kept:,} of {spec.sie_rows:,} rows")
        left_out = (f"{self.sie_left_out:,} rows of side information",) if self.sie_left_out else ()
        return Origin(source, tuple(kept), tuple(anew), left_out, has_text and self.same_identities)


def transfer(
    state: Mapping[str, Tensor], spec: ModelSpec, drawn_sie: Tensor | None, source: str, dataset: str
) -> Transfer:
    """drawn_sie: [rows, W] to begin anew with, None without side information. dataset: fingerprint of the dataset to
    train on, empty where it is not known.

    Raises ModelError when `state` is of no such checkpoint.
    """
    card, shapes = find_card(source), official_shapes(state, source)
    trained_on = card.training.get("dataset", {}).get("fingerprint", "") if card else ""
    others = bool(trained_on and dataset and trained_on != dataset)
    fitted = {name: value for name, value in state.items() if name != SIE}
    kept = 0
    if drawn_sie is not None:
        fitted[SIE], kept = side_information(state.get(SIE), drawn_sie, spec, card)
    same = shapes.identities == spec.identities and not others
    return Transfer(fitted, shapes.identities, same, kept, 0 if spec.is_resnet else shapes.sie_rows - kept)


def side_information(
    theirs: Tensor | None, drawn: Tensor, spec: ModelSpec, card: ModelCard | None
) -> tuple[Tensor, int]:
    """Rows of cameras and views that both have from the checkpoint, the others as drawn; and how many are kept."""
    if theirs is None or theirs.shape[1:] != drawn.shape[1:] or (card and card.spec.sie != spec.sie):
        return drawn, 0
    ours, old = _grid(spec), _grid(card.spec) if card else None
    if old is None:  # the authors' files do not say how many of the rows are views
        if spec.sie == "camera+view" and len(theirs) != len(drawn):
            return drawn, 0
        old = ours if len(theirs) == len(drawn) else (len(theirs), 1)
    cameras, views = min(ours[0], old[0]), min(ours[1], old[1])
    table = drawn.clone().unflatten(0, ours)
    table[:cameras, :views] = theirs.float().unflatten(0, old)[:cameras, :views]
    return table.flatten(0, 1), cameras * views


def _grid(spec: ModelSpec) -> tuple[int, int]:
    """Rows of the table of side information, by camera and view; one of the two alone is the first."""
    return (spec.cameras, spec.views) if spec.sie == "camera+view" else (spec.sie_rows, 1)


def without_prompts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of the tables of a model that has no text side."""
    return {name: shape for name, shape in shapes.items() if name != TOKENS}
