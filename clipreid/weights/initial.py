"""The models of a specification with the weights that a run starts from: random, CLIP's, or the paper's authors'.

    ModelSpec, model.pretrained ──▶ [initial] ──▶ ReIDModel, PromptedText, IdentityTables ──▶ stages, evaluation

CLIP is built by open_clip at its native size and filled; its towers are then taken over into our modules, which resize
the position embedding and add necks, side information and the words of the prompts. What has a row per identity is in
tables, of which each rank makes its own rows.
"""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipreid.identity_table import IdentityTables
from clipreid.model.clip_library import open_clip
from clipreid.model.encoders import ImageEncoder, ResNetEncoder, ViTEncoder
from clipreid.model.prompts import PromptedText, PromptLearner, TextEncoder, template_ids
from clipreid.model.reid import ReIDModel, drawn_side_information
from clipreid.model.spec import ModelSpec
from clipreid.peers import ALONE, Peers
from clipreid.weights.card import local_file
from clipreid.weights.official import load_official, renamed
from clipreid.weights.pretrained import is_official, load_clip, read_pretrained
from clipreid.weights.tables import drawn_tables, table_shapes, taken_tables
from clipreid.weights.transfer import Origin, transfer, without_prompts


class Models(NamedTuple):
    """A specification with weights."""

    model: ReIDModel
    text: PromptedText | None
    """None with a checkpoint that holds no text side, as a baseline's does."""
    tables: IdentityTables

    def state_dict(self) -> dict[str, Tensor]:
        """All of it by the names that files of weights have; of the tables this rank's rows."""
        text = {} if self.text is None else self.text.state_dict()
        return self.model.state_dict() | text | {table.name: table.block.detach() for table in self.tables}


class Start(NamedTuple):
    """What a run begins with."""

    models: Models
    origin: Origin | None
    """What was kept of a re-identification checkpoint; None without one."""


def build_models(spec: ModelSpec, pretrained: str | None = None, seed: int = 0, peers: Peers = ALONE) -> Models:
    """As `start`, without what is told of it."""
    return start(spec, pretrained, seed, peers).models


def start(
    spec: ModelSpec, pretrained: str | None = None, seed: int = 0, peers: Peers = ALONE, dataset: str = ""
) -> Start:
    """The image model, the text side and this rank's rows of the tables of `spec`: on the CPU, float32, in training
    mode.

    `pretrained`: None (random weights), an open_clip tag, a local file of CLIP's weights, or a run folder, a file of
    ours or a checkpoint of the paper's authors, of any identities. What it does not hold, or holds for other identities
    and cameras, is drawn from `seed`; the global random state is left alone.
    `dataset`: fingerprint of the dataset to train on: identities of another one are others, however many they are.
    Raises ModelError when the weights cannot be had or do not fit.
    """
    if pretrained is None:
        with _seeded(seed, "clip"):
            clip = open_clip.CLIP(**_clip_arguments(spec))
        return Start(_with_drawn_tables(spec, clip, seed, peers), None)
    state = read_pretrained(pretrained, spec.arch, spec.arch_config)
    if is_official(state):
        return _continued(spec, state, pretrained, seed, peers, dataset)
    with torch.device("meta"):  # initialising what is overwritten at once takes seconds
        clip = open_clip.CLIP(**_clip_arguments(spec))
    clip.to_empty(device="cpu")
    load_clip(clip, state, pretrained)
    return Start(_with_drawn_tables(spec, clip, seed, peers), None)


def _continued(
    spec: ModelSpec, state: Mapping[str, Tensor], pretrained: str, seed: int, peers: Peers, dataset: str
) -> Start:
    """From a re-identification checkpoint."""
    source = str(local_file(pretrained) or pretrained)
    model, text = empty_models(spec)
    given = transfer(state, spec, _drawn_sie(model, seed), source, dataset)
    text_side = load_official(model, text, given.state, replace(spec, identities=given.identities), source)
    if given.same_identities:
        tables = taken_tables(renamed(state), peers)
    else:
        shapes = table_shapes(spec, model, text)
        tables = drawn_tables(shapes if text_side else without_prompts(shapes), seed, peers)
    return Start(Models(model, text_side, tables), given.origin(pretrained, spec, text_side is not None))


def _drawn_sie(model: ReIDModel, seed: int) -> Tensor | None:
    """Side information as a run from CLIP's weights begins with it."""
    if model.cv_embed is None:
        return None
    with _seeded(seed, "heads"):
        return drawn_side_information(*model.cv_embed.shape)


def empty_models(spec: ModelSpec) -> tuple[ReIDModel, PromptedText]:
    """Both parts of `spec` on the CPU with uninitialised weights, for a state dict to be loaded into."""
    with torch.device("meta"):
        model, text = _rewire(spec, open_clip.CLIP(**_clip_arguments(spec)), seed=0)
    return model.to_empty(device="cpu"), text.to_empty(device="cpu")


def _with_drawn_tables(spec: ModelSpec, clip: open_clip.CLIP, seed: int, peers: Peers) -> Models:
    model, text = _rewire(spec, clip, seed)
    return Models(model, text, drawn_tables(table_shapes(spec, model, text), seed, peers))


def _clip_arguments(spec: ModelSpec) -> dict[str, Any]:
    return {key: value for key, value in spec.arch_config.items() if key != "custom_text"}


def _rewire(spec: ModelSpec, clip: open_clip.CLIP, seed: int) -> tuple[ReIDModel, PromptedText]:
    """Take the towers of an open_clip CLIP over into our modules, and add what re-identification needs."""
    context = spec.arch_config["text_cfg"]["context_length"]
    ids, end = template_ids(spec.noun, spec.prompt_tokens, context)
    learner = PromptLearner(clip.token_embedding.weight[ids], end, spec.prompt_tokens)
    with _seeded(seed, "heads"):
        model = ReIDModel(spec, _encoder(spec, clip.visual))
    return model, PromptedText(learner, TextEncoder(clip))


def _encoder(spec: ModelSpec, visual: nn.Module) -> ImageEncoder:
    if spec.is_resnet:
        return ResNetEncoder(visual, spec.grid)
    return ViTEncoder(visual, spec.grid, spec.stride or spec.patch_size, spec.sie_tokens)


@contextmanager
def _seeded(seed: int, purpose: str) -> Iterator[None]:
    """Draw from (seed, purpose) instead of the global CPU random state, which is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        # default_generator, because torch.manual_seed would also reseed every CUDA device.
        torch.default_generator.manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))
        yield
