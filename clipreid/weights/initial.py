"""The models of a specification with the weights that a run starts from: random, CLIP's, or the paper's authors'.

    ModelSpec, model.pretrained ──▶ [initial] ──▶ ReIDModel, PromptedText ──▶ stage 1, stage 2, evaluation

CLIP is built by open_clip at its native size and filled; its towers are then taken over into our modules, which resize
the position embedding and add necks, classifiers, side information and prompts.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import open_clip
import torch
from torch import nn

from clipreid.model.encoders import ImageEncoder, ResNetEncoder, ViTEncoder
from clipreid.model.prompts import PromptedText, PromptLearner, TextEncoder, template_ids
from clipreid.model.reid import ReIDModel
from clipreid.model.spec import ModelSpec
from clipreid.weights.official import load_official
from clipreid.weights.pretrained import is_official, load_clip, read_pretrained


def build_models(
    spec: ModelSpec, pretrained: str | None = None, seed: int = 0
) -> tuple[ReIDModel, PromptedText | None]:
    """The image model and the text side of `spec`, on the CPU, float32, in training mode.

    `pretrained`: None (random weights), an open_clip tag, or a local file: CLIP weights, or a checkpoint of the paper's
    authors (the text side is None when that holds none, as a baseline's does). What it does not hold is drawn from
    `seed`; the global random state is left alone.
    Raises ModelError when the weights cannot be had or do not fit.
    """
    if pretrained is None:
        with _seeded(seed, "clip"):
            clip = open_clip.CLIP(**_clip_arguments(spec))
        return _rewire(spec, clip, seed)
    state = read_pretrained(pretrained, spec.arch, spec.arch_config)
    if is_official(state):
        model, text = empty_models(spec)
        return model, load_official(model, text, state, spec, pretrained)
    with torch.device("meta"):  # initialising what is overwritten at once takes seconds
        clip = open_clip.CLIP(**_clip_arguments(spec))
    clip.to_empty(device="cpu")
    load_clip(clip, state, pretrained)
    return _rewire(spec, clip, seed)


def empty_models(spec: ModelSpec) -> tuple[ReIDModel, PromptedText]:
    """Both parts of `spec` on the CPU with uninitialised weights, for a state dict to be loaded into."""
    with torch.device("meta"):
        model, text = _rewire(spec, open_clip.CLIP(**_clip_arguments(spec)), seed=0)
    return model.to_empty(device="cpu"), text.to_empty(device="cpu")


def _clip_arguments(spec: ModelSpec) -> dict[str, Any]:
    return {key: value for key, value in spec.arch_config.items() if key != "custom_text"}


def _rewire(spec: ModelSpec, clip: open_clip.CLIP, seed: int) -> tuple[ReIDModel, PromptedText]:
    """Take the towers of an open_clip CLIP over into our modules, and add what re-identification needs."""
    context = spec.arch_config["text_cfg"]["context_length"]
    ids, end = template_ids(spec.noun, spec.prompt_tokens, context)
    with _seeded(seed, "prompts"):
        learner = PromptLearner(clip.token_embedding.weight[ids], end, spec.identities, spec.prompt_tokens)
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
