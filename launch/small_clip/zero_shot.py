"""What a CLIP knows of pictures whose vehicles it never saw, asked in words alone.

    Pictures of other identities, CLIP ──▶ [zero-shot check] ──▶ share of right answers, beside that of guessing

Each question has one text for each answer; the text nearest to the picture is taken.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clipreid.augment import normalise
from clipreid.model.clip_library import open_clip
from launch.small_clip.pictures import Pictures
from launch.small_clip.training import MEAN, STD, Vocabulary, tokenize
from shards.demo.captions import DIRECTIONS
from shards.demo.looks import COLOURS, SHAPES

TEXTS = {
    "colour": [f"A photo of a {colour} vehicle." for colour in COLOURS],
    "body": [f"A photo of a {shape}." for shape in SHAPES],
    "direction": [f"A photo of a vehicle, seen from the {direction}." for direction in DIRECTIONS],
}
"""A text for each answer, by question."""


class Answered(NamedTuple):
    """One question, over all pictures. Shares in 0 … 1."""

    right: float
    chance: float
    """Of a guess among all answers."""
    commonest: float
    """Of always giving the answer that is right most often."""


def ask(clip: open_clip.CLIP, pictures: Pictures, vocabulary: Vocabulary) -> dict[str, Answered]:
    """The share of right answers to each question."""
    images = image_features(clip.encode_image, pictures.pixels)
    truths = {
        "colour": [list(COLOURS).index(looks.colour) for looks in pictures.looks],
        "body": [list(SHAPES).index(looks.shape) for looks in pictures.looks],
        "direction": [sight.view for sight in pictures.sights],
    }
    answered = {}
    for question, texts in TEXTS.items():
        with torch.no_grad():
            packed = vocabulary.pack(tokenize(texts))
            answers = (images @ clip.encode_text(packed, normalize=True).T).argmax(1)
        truth = truths[question]
        right = (answers == torch.tensor(truth)).double().mean().item()
        commonest = Counter(truth).most_common(1)[0][1] / len(truth)
        answered[question] = Answered(right, 1 / len(texts), commonest)
    return answered


@torch.no_grad()
def image_features(encode: Callable[..., Tensor], pixels: Tensor, batch: int = 256) -> Tensor:
    """uint8 [n, 3, H, W] -> features of length 1, [n, D]."""
    return torch.cat([encode(normalise(part, MEAN, STD), normalize=True) for part in pixels.split(batch)])
