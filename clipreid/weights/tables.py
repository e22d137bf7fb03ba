"""Rows of the identity tables: drawn, or taken from a file, by the rank that owns them.

    seed, or a file's rows ──▶ [tables] ──▶ IdentityTables ──▶ stage 1, stage 2

Their names are those that files of weights have for them: ours, and the authors'.

N = identities, M = tokens of a prompt, W = width of the text tower
"""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from clipreid.identity_table import IdentityTable, IdentityTables
from clipreid.model.prompts import PromptedText
from clipreid.model.reid import ReIDModel
from clipreid.model.spec import ModelSpec
from clipreid.peers import ALONE, Peers, rank_slice
from clipreid.weights.card import weights_file
from clipreid.weights.sealed import Place, check_tensor, read_header, read_pieces
from clipreid.weights.types import DTYPES

TOKENS, CLASSIFIER, CLASSIFIER_PROJ = "prompt_learner.tokens", "classifier.weight", "classifier_proj.weight"
STD = {TOKENS: 0.02, CLASSIFIER: 0.001, CLASSIFIER_PROJ: 0.001}
DRAWN_ROWS = 1024
"""Rows from one generator: a rank draws those that hold its own, and they don't depend on the number of ranks."""


def table_shapes(spec: ModelSpec, model: ReIDModel, text: PromptedText) -> dict[str, tuple[int, ...]]:
    """Of the whole tables, by name."""
    _, img, proj = model.image_encoder.widths
    text_width = text.prompt_learner.token_prefix.shape[2]
    n = spec.identities
    return {CLASSIFIER: (n, img), CLASSIFIER_PROJ: (n, proj), TOKENS: (n, spec.prompt_tokens, text_width)}


def drawn_tables(shapes: Mapping[str, tuple[int, ...]], seed: int, peers: Peers) -> IdentityTables:
    """Normal numbers, of the standard deviations of the paper's authors."""
    return _tables(
        {name: IdentityTable(name, shape[0], _drawn(name, shape, seed, peers), peers) for name, shape in shapes.items()}
    )


def _drawn(name: str, shape: tuple[int, ...], seed: int, peers: Peers) -> Tensor:
    own = rank_slice(shape[0], peers.rank, peers.world_size)
    block = np.empty((own.stop - own.start, *shape[1:]), np.float32)
    for first in range(own.start // DRAWN_ROWS * DRAWN_ROWS, own.stop, DRAWN_ROWS):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), first])
        rows = rng.standard_normal((DRAWN_ROWS, *shape[1:]), np.float32) * np.float32(STD[name])
        start, stop = max(first, own.start), min(first + DRAWN_ROWS, own.stop)
        block[start - own.start : stop - own.start] = rows[start - first : stop - first]
    return torch.from_numpy(block)


def taken_tables(state: Mapping[str, Tensor], peers: Peers) -> IdentityTables:
    """This rank's rows of whole tables, float32."""
    names = [name for name in (CLASSIFIER, CLASSIFIER_PROJ, TOKENS) if name in state]
    return _tables({name: _own_rows(name, state[name], peers) for name in names})


def _own_rows(name: str, rows: Tensor, peers: Peers) -> IdentityTable:
    block = rows[rank_slice(len(rows), peers.rank, peers.world_size)].to(torch.float32, copy=True)
    return IdentityTable(name, len(rows), block, peers)


def _tables(tables: Mapping[str, IdentityTable]) -> IdentityTables:
    return IdentityTables(tables[CLASSIFIER], tables[CLASSIFIER_PROJ], tables.get(TOKENS))


def load_table(path: str | Path, name: str, peers: Peers = ALONE) -> IdentityTable | None:
    """This rank's rows of a table in a run folder or .safetensors file; None where it has none of this name.

    Raises DamagedError where the file has other bytes than were written.
    """
    path = weights_file(path)
    header = read_header(path)
    if name not in header.places:
        return None
    with path.open("rb") as file:
        check_tensor(file, header, name)
        return read_table(file, header.places[name], name, peers)


def read_table(file: IO[bytes], place: Place, name: str, peers: Peers = ALONE) -> IdentityTable:
    """This rank's rows of a table that lies at `place` in a file, as float32; nothing else is read."""
    num_identities, row = place.shape[0], place.shape[1:]
    own = rank_slice(num_identities, peers.rank, peers.world_size)
    block = torch.empty(own.stop - own.start, *row)
    dtype, flat, filled = DTYPES[place.dtype], block.view(-1), 0
    row_bytes = dtype.itemsize * math.prod(row)
    for piece in read_pieces(file, place.start + own.start * row_bytes, place.start + own.stop * row_bytes):
        values = torch.frombuffer(bytearray(piece), dtype=dtype)
        flat[filled : filled + len(values)] = values
        filled += len(values)
    return IdentityTable(name, num_identities, block, peers)
