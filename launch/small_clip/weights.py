"""The trained CLIP as a file small enough to ship: half precision, and of the vocabulary what captions use.

    CLIP, Vocabulary ──▶ [weights] ──▶ demo_clip.safetensors ──▶ model.pretrained, as any CLIP file

Positions behind those that captions were read to are 0: no gradient has reached them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipreid.model.arch import VOCABULARY
from clipreid.weights.appearing import appearing
from clipreid.weights.sealed import dump
from clipreid.weights.types import stored
from clipreid.weights.vocabulary import cut_vocabulary
from launch.small_clip.training import LENGTH, Vocabulary

POSITIONS = "positional_embedding"


def write_clip(
    out: Path, state: dict[str, Tensor], vocabulary: Vocabulary, arch: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Write the state dict of a trained CLIP; `facts` of its making stand in the file's metadata.

    The file appears only when it is complete. It depends on the weights and facts alone, so it can be made again.
    """
    text = arch["text_cfg"]
    positions = torch.zeros(text["context_length"], text["width"])
    positions[:LENGTH] = state[POSITIONS]
    half = {name: value.detach().half() for name, value in (state | {POSITIONS: positions}).items()}
    tensors, metadata = cut_vocabulary(half, vocabulary.ids, VOCABULARY, seed=facts["seed"])
    with appearing(out) as file:
        file.writelines(
            dump({name: stored(value) for name, value in tensors.items()}, metadata | {"made": json.dumps(facts)})
        )


def rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a reader of the file gets: half precision, as float32."""
    return {name: value.half().float() for name, value in state.items()}
