"""The re-identification model: image encoder, side information, necks and classifiers.

    augment -> [model: encoder -> necks -> classifiers] -> losses -> stage 2
                      encoder -> descriptor -> retrieval
    labels  -> prompts -> stage 1

Built from a ModelSpec, at random or from CLIP's weights. Names of parameters are those of the checkpoints
that the paper's authors released (`image_encoder.*`, `bottleneck.*`, `classifier.weight`, `cv_embed`).
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipreid.model.encoders import Features, ImageEncoder, ResNetEncoder, ViTEncoder
from clipreid.model.prompts import PromptedText, PromptLearner, TextEncoder, template_ids
from clipreid.model.spec import ModelSpec
from clipreid.weights.official import load_official
from clipreid.weights.pretrained import is_official, load_clip, read_pretrained

__all__ = ["Features", "ModelSpec", "ReIDModel", "ReIDOutput", "build_models", "descriptor", "empty_models"]

# B = images, W = width of the image tower, N = training identities


class ReIDOutput(NamedTuple):
    """What stage 2's losses are made of, at least float32 whatever precision the encoder ran in."""

    features: Features
    """Before the necks: float [B, *] each."""
    logits: tuple[Tensor, Tensor]
    """Logits [B, N] of the image feature and of the projected feature."""


class ReIDModel(nn.Module):
    """Image encoder with side information, and for each of its last two features a neck and a classifier."""

    def __init__(self, spec: ModelSpec, image_encoder: ImageEncoder) -> None:
        super().__init__()
        self.sie, self.sie_coefficient = spec.sie, spec.sie_coefficient
        self.cameras, self.views = spec.cameras, spec.views
        self.image_encoder = image_encoder
        _, img, proj = image_encoder.widths
        self.bottleneck, self.bottleneck_proj = nn.BatchNorm1d(img), nn.BatchNorm1d(proj)
        self.classifier = nn.Linear(img, spec.identities, bias=False)
        self.classifier_proj = nn.Linear(proj, spec.identities, bias=False)
        self.cv_embed = nn.Parameter(torch.empty(spec.sie_rows, img)) if spec.sie_rows else None
        self._initialise()

    def forward(self, images: Tensor, cameras: Tensor | None = None, views: Tensor | None = None) -> ReIDOutput:
        """Float images [B, 3, H, W], cameras and views int64 [B] (-1 = unknown), to features and logits."""
        features = self.features(images, cameras, views)
        with torch.autocast(images.device.type, enabled=False):  # BatchNorm statistics and logits in full precision
            logits = (
                self.classifier(self.bottleneck(features.img)),
                self.classifier_proj(self.bottleneck_proj(features.proj)),
            )
        return ReIDOutput(features, logits)

    def features(self, images: Tensor, cameras: Tensor | None = None, views: Tensor | None = None) -> Features:
        """Features before the necks, at least float32. Without cameras and views: without side information."""
        features = self.image_encoder(images, self.side_information(cameras, views))
        return Features(*(value.to(torch.promote_types(value.dtype, torch.float32)) for value in features))

    def side_information(self, cameras: Tensor | None, views: Tensor | None) -> Tensor | None:
        """Vectors [B, W] to add to the tokens (TransReID's SIE), from cameras and views int64 [B].

        A camera or view that is unknown (-1), or that the table has no row for, gives zero. None without a
        table, or where neither cameras nor views are given.
        """
        if self.cv_embed is None or (cameras is None and views is None):
            return None
        row, known = 0, True
        for used, values, count in (("camera", cameras, self.cameras), ("view", views, self.views)):
            if used in self.sie:
                assert values is not None, f"model.sie={self.sie} needs the {used}s of the images"
                row = row * count + values
                known = known & (values >= 0) & (values < count)
        return self.sie_coefficient * self.cv_embed[row * known] * known.unsqueeze(1)

    def _initialise(self) -> None:
        for neck in (self.bottleneck, self.bottleneck_proj):
            neck.bias.requires_grad_(False)  # stays 0, so that the classifier's planes pass through the origin
        for classifier in (self.classifier, self.classifier_proj):
            nn.init.normal_(classifier.weight, std=0.001)
        if self.cv_embed is not None:
            nn.init.trunc_normal_(self.cv_embed, std=0.02)


def descriptor(features: Features, parts: Sequence[str] = ("img", "proj")) -> Tensor:
    """What images are compared by: the chosen features concatenated, then L2-normalised as one vector, [B, sum]."""
    return F.normalize(torch.cat([getattr(features, part) for part in parts], dim=1), dim=1)


def build_models(
    spec: ModelSpec, pretrained: str | None = None, seed: int = 0
) -> tuple[ReIDModel, PromptedText | None]:
    """The image model and the text side of `spec`, on the CPU, float32, in training mode.

    `pretrained`: None (random weights), an open_clip tag, or a local file: CLIP weights, or a checkpoint of
    the paper's authors (the text side is None where that holds none, as a baseline's does). What it does not
    hold is drawn from `seed`; the global random state is left alone.
    Raises ModelError where the weights cannot be had or do not fit.
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


def _rewire(spec: ModelSpec, clip: nn.Module, seed: int) -> tuple[ReIDModel, PromptedText]:
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
def _seeded(seed: int, part: str) -> Iterator[None]:
    """Draw from (seed, part) instead of the global CPU random state, which is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        # default_generator, because torch.manual_seed would also reseed every CUDA device.
        torch.default_generator.manual_seed(zlib.crc32(f"{seed}/{part}".encode()))
        yield
