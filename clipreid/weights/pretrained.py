"""CLIP weights in: an open_clip tag, or a local file, to a state dict in OpenAI's names.

    tag or file ──▶ [pretrained] ──▶ initial (towers filled at their native size, then re-wired)

In:  "openai" or another tag of open_clip's (downloaded by open_clip), or a local file: a TorchScript archive, a
     pickled `state_dict` (bare, or under "state_dict" or "model", with or without "module." before its names), or
     safetensors, maybe with a part of the vocabulary (`vocabulary.py`). Nothing in it is run: pickles may hold tensors
     only, and of an archive (`torchscript.py`) the tensors are read.
Out: {name: Tensor} with names such as `visual.conv1.weight`.
"""

import math
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from clipreid.errors import ModelError
from clipreid.model.arch import check_activation, check_tag
from clipreid.weights.card import local_file
from clipreid.weights.download import fetch
from clipreid.weights.sealed import DamagedError, check_file
from clipreid.weights.torchscript import is_torchscript, read_torchscript
from clipreid.weights.vocabulary import with_vocabulary

if TYPE_CHECKING:
    from open_clip import CLIP

OFFICIAL_PREFIX = "image_encoder."
"""Begins names in the checkpoints of CLIP-ReID's authors, and in ours; CLIP's own say `visual.`."""

# Settings that OpenAI's archives carry as tensors beside the weights.
_OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")
# Parameters of CLIP that are no part of re-identification: similarities are unscaled dot products.
_UNUSED = ("logit_scale", "logit_bias")

MOST_UNPACKED_BYTES = 256 << 20
"""That an archive may take more than its file: the source in it is compressed, its tensors are not."""


def read_pretrained(pretrained: str, arch: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict behind `model.pretrained`: a local file, a run folder, or a tag that open_clip knows for `arch`.

    Raises ModelError, one line, when the tag is unknown, the download fails, the file cannot be read, or the weights
    are known to belong to another activation function than the model of `config` has.
    """
    if path := local_file(pretrained):
        state = read_state_dict(path)
        if all(mark in state for mark in _OPENAI_MARKS):
            check_activation(pretrained, True, arch, config)
        return state
    check_tag(pretrained, arch, config)
    return read_state_dict(fetch(pretrained, arch))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a TorchScript archive, a pickled state dict or a safetensors file, less any "module." prefix.

    Raises ModelError when the file is none of these. Dtypes are as stored.
    """
    loaded: Any
    with _unreadable(path):
        _check_archive(path)
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                header = check_file(file, path.stat().st_size, str(path))
            loaded = with_vocabulary(load_file(path), header.metadata)
        elif is_torchscript(path):
            loaded = read_torchscript(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not loaded or not all(_is_named_tensor(*item) for item in loaded.items()):
        raise ModelError(f"{path}: holds no state dict (names with tensors); give a CLIP or CLIP-ReID checkpoint")
    with _unreadable(path):
        for name, value in loaded.items():
            _check_tensor(name, value)
    return {name.removeprefix("module."): value for name, value in loaded.items()}


def is_official(state: dict[str, Tensor]) -> bool:
    """Whether the names are those of a re-identification checkpoint rather than of CLIP."""
    return any(name.startswith(OFFICIAL_PREFIX) for name in state)


def load_clip(clip: "CLIP", state: dict[str, Tensor], source: str) -> None:
    """Fill an open_clip CLIP, at its native size, with `state`; every weight must be there, in its shape.

    A square position embedding of another size is taken over as it is: the encoders resize it once, to their grid.
    Raises ModelError when they do not fit; it names the weight and both shapes, or what is missing or unknown.
    """
    state = {name.removeprefix("text."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if name not in (*_OPENAI_MARKS, *_UNUSED)}
    pool = getattr(clip.visual, "attnpool", None)
    for module, name in ((clip.visual, "visual."), (pool, "visual.attnpool.")):
        rows = state.get(f"{name}positional_embedding")
        if module is not None and rows is not None and _is_square_grid(rows):
            module.positional_embedding = nn.Parameter(torch.empty_like(rows, dtype=torch.float32))
    wanted = {name: value for name, value in clip.state_dict().items() if name not in _UNUSED}
    state = with_batch_counters(state, wanted)
    check_fit(state, wanted, source)
    clip.load_state_dict(state, strict=False)


def with_batch_counters(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with BatchNorm's counters of batches, which older files lack and nothing here reads, set to 0."""
    counters = [name for name in wanted if name.endswith("num_batches_tracked")]
    return {name: torch.zeros((), dtype=torch.int64) for name in counters} | state


def check_fit(state: dict[str, Tensor], wanted: dict[str, Tensor], source: str) -> None:
    """Raise ModelError unless `state` has exactly the names of `wanted`, in the same shapes."""
    for name, value in wanted.items():
        if name in state and state[name].shape != value.shape:
            raise ModelError(
                f"{source}: {name} is {tuple(state[name].shape)}, the configured model needs "
                f"{tuple(value.shape)}: choose the model.arch that these weights belong to"
            )
    for problem, names in (("lacks", wanted.keys() - state.keys()), ("has unknown", state.keys() - wanted.keys())):
        if names:
            first, *others = sorted(names)
            more = f" and {len(others)} more" if others else ""
            raise ModelError(f"{source}: {problem} {first}{more}: these weights are not of the configured model.arch")


def _is_square_grid(rows: Tensor) -> bool:
    return math.isqrt(len(rows) - 1) ** 2 == len(rows) - 1


def _is_named_tensor(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _check_tensor(name: str, value: Tensor) -> None:
    """Raises ValueError unless all of a tensor's numbers are in the file: a few bytes can stand for any size."""
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise ValueError(f"{name} is not a plain tensor: it is {value.layout}, {value.dtype} on {value.device}")
    if math.prod(value.shape) * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{name} has shape {tuple(value.shape)}, and fewer numbers than that")


def _check_archive(path: Path) -> None:
    """Raises DamagedError where a member of an archive of torch's, ours among them, is not what was written: torch
    itself does not look. ValueError where it would unpack to far more than it is."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size + MOST_UNPACKED_BYTES:
            raise ValueError(f"it would unpack to {unpacked} bytes")
        if member := archive.testzip():
            raise DamagedError(f"{path}: {member} is not as it was written: the file is damaged; copy it again")


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except DamagedError:
        raise
    except Exception as error:  # a stranger's file makes the readers of pickles and zip files raise anything
        unsafe = isinstance(error, pickle.UnpicklingError)  # its own message advises to load it all the same
        reason = "pickled objects other than tensors" if unsafe else _first_line(error)
        raise ModelError(
            f"{path}: cannot be read as weights ({type(error).__name__}: {reason}); "
            "give a TorchScript archive, a state dict saved by torch.save, or a .safetensors file"
        ) from None


def _first_line(error: Exception) -> str:
    """The first sentence or two: loaders append whole paragraphs of advice."""
    line = (str(error).strip() or "no message").splitlines()[0]
    return line if len(line) <= 300 else f"{line[:300]}…"
