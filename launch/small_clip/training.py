"""Contrastive training of a small CLIP: pictures and their captions, pulled together against the rest of a batch.

    Pictures ──▶ [training: captions, augment, open_clip's CLIP and loss] ──▶ CLIP ──▶ weights, zero-shot check

Every batch, caption and augmentation is a pure function of (seed, epoch, step), so a stopped training goes on from its
last whole epoch to the same weights, on the same processor and number of threads.
"""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clipreid.augment import AugmentSettings, augment
from clipreid.model.clip_library import open_clip
from launch.small_clip.pictures import Pictures
from shards.demo.captions import all_words

THREADS = 2
"""Of the training, however many cores there are: sums are in another order with other numbers."""
LENGTH = 56
"""Entries of a text that are read, start and end included. Captions have 30 on average, and hardly any has more."""
MEAN = STD = (0.5, 0.5, 0.5)
"""Of pixels, as `data.pixel_mean` and `data.pixel_std` have them."""


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, beside the pictures."""

    seed: int
    epochs: int
    batch: int = 128
    lr: float = 1e-3
    """At the end of the warm-up, from which a cosine falls to 0."""
    warmup_steps: int = 100
    weight_decay: float = 0.05
    """AdamW's, of what is a matrix."""
    pad: int = 4
    erase: float = 0.0
    """Random erasing takes what the caption names."""
    highest_scale: float = 100.0
    """Of the similarities (1 / temperature)."""


class Vocabulary:
    """The entries of CLIP's vocabulary that captions use, numbered anew; their order stays, so the end is the last."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = sorted(ids)
        self.place = {entry: place for place, entry in enumerate(self.ids)}

    def pack(self, texts: list[list[int]]) -> Tensor:
        """Entries of each text, int64 [n, LENGTH], with the first entry of all behind its end. A longer one is cut
        before its end, as CLIP's tokenizer does."""
        packed = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
        for row, text in zip(packed, texts, strict=True):
            kept = [*text[: LENGTH - 1], text[-1]] if len(text) > LENGTH else text
            row[: len(kept)] = torch.tensor([self.place[entry] for entry in kept])
        return packed


class Epoch(NamedTuple):
    """What is told after an epoch."""

    epoch: int
    loss: float
    """Mean over its steps."""
    scale: float


def tokenize(captions: list[str]) -> list[list[int]]:
    """Vocabulary entries of each, with start and end."""
    tokenizer = _tokenizer()
    return [[tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id] for text in captions]


def caption_vocabulary() -> Vocabulary:
    """Of all captions that there can be, and of the prompts' words, which captions have as well."""
    return Vocabulary(list({entry for text in tokenize([all_words()]) for entry in text}))


def new_clip(arch: dict[str, Any], vocabulary: Vocabulary, seed: int) -> open_clip.CLIP:
    """open_clip's model of these two towers, from random weights, with the words in use as its whole vocabulary."""
    text = arch["text_cfg"] | {"vocab_size": len(vocabulary.ids), "context_length": LENGTH}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return open_clip.CLIP(arch["embed_dim"], arch["vision_cfg"], text)


def train(
    clip: open_clip.CLIP,
    pictures: Pictures,
    vocabulary: Vocabulary,
    recipe: Recipe,
    checkpoint: Path,
    tell: Callable[[Epoch], None],
) -> None:
    """Train `clip` in place, from the checkpoint where there is one of the same recipe and pictures."""
    optimizer = torch.optim.AdamW(_groups(clip, recipe.weight_decay), lr=0.0, betas=(0.9, 0.98), eps=1e-6)
    loss_of = open_clip.ClipLoss()
    what = json.dumps([asdict(recipe), len(pictures.pixels), LENGTH])
    first = _resume(checkpoint, what, clip, optimizer)
    clip.train()
    for epoch in range(first, recipe.epochs + 1):
        total, steps = 0.0, len(pictures.pixels) // recipe.batch
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(pictures.pixels))
        for step in range(1, steps + 1):
            rows = order[(step - 1) * recipe.batch : step * recipe.batch]
            images, texts = _batch(pictures, vocabulary, recipe, rows, epoch, step)
            _set_lr(optimizer, recipe, (epoch - 1) * steps + step, recipe.epochs * steps)
            image_features, text_features, scale = clip(images, texts)
            loss = loss_of(image_features, text_features, scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                clip.logit_scale.clamp_(0, math.log(recipe.highest_scale))
            total += loss.item()
        _save(checkpoint, what, epoch, clip, optimizer)
        tell(Epoch(epoch, total / steps, clip.logit_scale.exp().item()))
    clip.eval()


def _batch(
    pictures: Pictures, vocabulary: Vocabulary, recipe: Recipe, rows: np.ndarray, epoch: int, step: int
) -> tuple[Tensor, Tensor]:
    """Float images and packed captions. Half of the pictures are mirrored, and so are their captions."""
    mirrored = np.random.default_rng((recipe.seed, epoch, step)).random(len(rows)) < 0.5
    captions = _captions(pictures, rows, (recipe.seed, epoch), mirrored)
    pixels = pictures.pixels[torch.from_numpy(rows)]
    pixels = torch.where(torch.from_numpy(mirrored)[:, None, None, None], pixels.flip(-1), pixels)
    settings = AugmentSettings(0.0, recipe.pad, recipe.erase, MEAN, STD)
    images = augment(pixels, torch.arange(len(rows)), seed=recipe.seed, epoch=epoch, epoch_step=step, settings=settings)
    return images, vocabulary.pack(tokenize(captions))


def _captions(pictures: Pictures, rows: np.ndarray, key: tuple[int, int], mirrored: np.ndarray) -> list[str]:
    """A fresh caption of each picture in each epoch."""
    return [
        pictures.caption(row, np.random.default_rng((*key, row)), flip)
        for row, flip in zip(rows.tolist(), mirrored.tolist(), strict=True)
    ]


def _groups(clip: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in clip.parameters() if p.ndim >= 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [p for p in clip.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def _set_lr(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int, steps: int) -> None:
    warm = min(1.0, step / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * warm * cosine


def _save(checkpoint: Path, what: str, epoch: int, clip: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    partial = checkpoint.with_suffix(".partial")
    state = {"what": what, "epoch": epoch, "clip": clip.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, partial)
    partial.replace(checkpoint)


def _resume(checkpoint: Path, what: str, clip: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The first epoch to train."""
    if not checkpoint.exists():
        return 1
    state = torch.load(checkpoint, weights_only=True)
    if state["what"] != what:
        return 1
    clip.load_state_dict(state["clip"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"]) + 1


@functools.cache
def _tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()
