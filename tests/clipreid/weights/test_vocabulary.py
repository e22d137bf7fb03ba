"""A file with a part of the vocabulary loads as one that has it whole."""

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clipreid.errors import ModelError
from clipreid.model.arch import VOCABULARY, check_arch
from clipreid.weights.initial import build_models
from clipreid.weights.pretrained import read_state_dict
from clipreid.weights.sealed import dump
from clipreid.weights.types import stored
from clipreid.weights.vocabulary import IDS, ROWS, WEIGHT, cut_vocabulary, drawn_rows
from tests.helpers.settings import model_spec

ARCH = "configs/models/tiny_vit.json"
IDS_USED = [269, 320, 539, 1125, 2533, 5299, 49406, 49407]
"""Of the words of the prompts, start and end."""


@pytest.fixture
def clip():
    """A CLIP whose vocabulary is drawn, but for the rows that training moved."""
    arch = check_arch(ARCH)
    torch.manual_seed(0)
    state = open_clip.CLIP(arch["embed_dim"], arch["vision_cfg"], arch["text_cfg"]).half().state_dict()
    state[WEIGHT] = drawn_rows(VOCABULARY, state[WEIGHT].shape[1], seed=3, std=0.02).half()
    state[WEIGHT][IDS_USED] += 1
    return state


def write(path, tensors, metadata):
    path.write_bytes(b"".join(map(bytes, dump({name: stored(value) for name, value in tensors.items()}, metadata))))
    return path


def test_a_file_with_a_part_of_the_vocabulary_gives_the_whole(clip, tmp_path):
    tensors, metadata = cut_vocabulary({**clip, WEIGHT: clip[WEIGHT][IDS_USED]}, IDS_USED, VOCABULARY, seed=3)
    small = write(tmp_path / "small.safetensors", tensors, metadata)
    assert small.stat().st_size < 1_000_000
    read = read_state_dict(small)
    assert read.keys() == clip.keys()
    assert all(torch.equal(read[name], clip[name]) for name in clip)


def test_it_starts_a_model_as_the_whole_file_does(clip, tmp_path):
    tensors, metadata = cut_vocabulary({**clip, WEIGHT: clip[WEIGHT][IDS_USED]}, IDS_USED, VOCABULARY, seed=3)
    small = write(tmp_path / "small.safetensors", tensors, metadata)
    save_file({name: value.contiguous() for name, value in clip.items()}, tmp_path / "whole.safetensors")
    spec = model_spec(ARCH, image_size=(32, 32), identities=3)
    one, other = (build_models(spec, str(path)).state_dict() for path in (small, tmp_path / "whole.safetensors"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["image_encoder.conv1.weight"].dtype == torch.float32


def test_rows_are_drawn_alike_everywhere():
    """By numpy's generator, whose stream is the same on every processor."""
    rows = drawn_rows(5, 4, seed=7, std=0.5)
    assert np.array_equal(rows.numpy(), np.random.default_rng(7).standard_normal((5, 4), dtype=np.float32) / 2)
    assert torch.equal(rows, drawn_rows(5, 4, seed=7, std=0.5)) and not torch.equal(rows, drawn_rows(5, 4, 8, 0.5))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, facts: facts.update(entries=300),
        lambda tensors, facts: facts.update(entries=1 << 40),
        lambda tensors, facts: facts.update(seed="x"),
        lambda tensors, facts: facts.pop("std"),
        lambda tensors, facts: tensors.update({IDS: tensors[IDS][1:]}),
        lambda tensors, facts: tensors.update({IDS: -tensors[IDS]}),
        lambda tensors, facts: tensors.update({ROWS: tensors[ROWS][0]}),
    ],
)
def test_a_vocabulary_that_is_not_what_the_file_says_is_refused_in_one_line(clip, tmp_path, change):
    tensors, metadata = cut_vocabulary({**clip, WEIGHT: clip[WEIGHT][IDS_USED]}, IDS_USED, VOCABULARY, seed=3)
    facts = json.loads(metadata["vocabulary_drawn"])
    change(tensors, facts)
    path = write(tmp_path / "odd.safetensors", tensors, {"vocabulary_drawn": json.dumps(facts)})
    with pytest.raises(ModelError, match=r"odd\.safetensors: cannot be read as weights") as error:
        read_state_dict(path)
    assert "\n" not in str(error.value)
