"""A CLIP file with only a part of its vocabulary: the rest is what it was before training, and is drawn again.

    CLIP ──▶ [cut_vocabulary] ──▶ small file ──▶ [with_vocabulary] ──▶ pretrained, as of any CLIP file

Training moves the rows of the words that its texts have. Where those are few, a file need not hold the other 49,000:
they are drawn from a seed which stands in the file's metadata.

V = entries of the vocabulary, W = width of the text tower
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

WEIGHT = "token_embedding.weight"
ROWS, IDS = "token_embedding.rows", "token_embedding.ids"
DRAWN = "vocabulary_drawn"
"""Of the metadata: {"entries": V, "seed": ..., "std": ...} of the rows that the file does not hold."""
STD = 0.02
"""As open_clip draws them."""
MOST_ENTRIES = 1 << 20
"""A number in a file is not to fill the memory."""


def drawn_rows(entries: int, width: int, seed: int, std: float) -> Tensor:
    """The whole vocabulary before training: float32 [V, W]."""
    draw = np.random.default_rng(seed).standard_normal((entries, width), dtype=np.float32)
    return torch.from_numpy(draw * np.float32(std))


def cut_vocabulary(
    state: Mapping[str, Tensor], ids: Sequence[int], entries: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict whose vocabulary is the rows of `ids` alone, as tensors and metadata of a file."""
    tensors = {name: value for name, value in state.items() if name != WEIGHT}
    tensors |= {ROWS: state[WEIGHT], IDS: torch.tensor(ids, dtype=torch.int32)}
    return tensors, {DRAWN: json.dumps({"entries": entries, "seed": seed, "std": STD})}


def with_vocabulary(state: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The state dict of such a file with its whole vocabulary, [V, W] of the stored rows' dtype; any other as it is.

    Raises ValueError where the rows are not what the metadata say.
    """
    if DRAWN not in metadata or ROWS not in state or IDS not in state:
        return state
    rows, ids = state.pop(ROWS), state.pop(IDS).long()
    facts = json.loads(metadata[DRAWN])
    entries, seed, std = int(facts["entries"]), int(facts["seed"]), float(facts["std"])
    if entries > MOST_ENTRIES or rows.ndim != 2 or ids.shape != rows.shape[:1] or not _within(ids, entries):
        raise ValueError(f"its vocabulary of {tuple(rows.shape)} rows is not a part of {entries} entries")
    whole = drawn_rows(entries, rows.shape[1], seed, std).to(rows.dtype)
    whole[ids] = rows
    return state | {WEIGHT: whole}


def _within(ids: Tensor, entries: int) -> bool:
    return not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < entries)
