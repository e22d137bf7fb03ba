"""The demo's CLIP: its pictures and captions, training that can be repeated, and a file that a run can start from."""

import json

import numpy as np
import pytest
import torch

from clipreid.augment import normalise
from clipreid.model.arch import check_arch
from clipreid.weights.initial import build_models
from launch.small_clip.pictures import PictureSettings, mirror, render
from launch.small_clip.training import (
    LENGTH,
    MEAN,
    STD,
    Recipe,
    Vocabulary,
    caption_vocabulary,
    new_clip,
    tokenize,
    train,
)
from launch.small_clip.weights import rounded, write_clip
from launch.small_clip.zero_shot import TEXTS, ask
from shards.demo.scene import Sight
from tests.helpers.settings import model_spec

ARCH = "configs/models/tiny_vit.json"
SETTINGS = PictureSettings(seed=41, identities=8, images=2, cameras=5, size=32)
RECIPE = Recipe(seed=3, epochs=3, batch=8, warmup_steps=2)


@pytest.fixture(scope="module")
def pictures():
    return render(SETTINGS, processes=1)


@pytest.fixture(scope="module")
def words():
    return caption_vocabulary()


def trained(pictures, words, checkpoint, epochs=RECIPE.epochs, stop_after=None):
    """The weights after a training, and what was told; `stop_after` an epoch it is interrupted."""
    told = []

    def tell(epoch):
        told.append(epoch)
        if epoch.epoch == stop_after:
            raise KeyboardInterrupt

    clip = new_clip(check_arch(ARCH), words, seed=3)
    train(clip, pictures, words, Recipe(seed=3, epochs=epochs, batch=8, warmup_steps=2), checkpoint, tell)
    return clip, told


@pytest.fixture(scope="module")
def clip(pictures, words, tmp_path_factory):
    return trained(pictures, words, tmp_path_factory.mktemp("clip") / "checkpoint.pt")[0]


def test_pictures_are_the_same_for_any_number_of_processes(pictures):
    other = render(SETTINGS, processes=2)
    assert torch.equal(other.pixels, pictures.pixels)
    assert (other.looks, other.sights) == (pictures.looks, pictures.sights)
    assert pictures.pixels.shape == (16, 3, 32, 32) and len(pictures.looks) == len(pictures.sights) == 16


@pytest.mark.parametrize(
    ("seen", "in_the_mirror"), [(0, 0), (1, 1), (2, 5), (3, 6), (4, 7), (5, 2), (6, 3), (7, 4)]
)  # front, rear, left, left front, left rear, right, right front, right rear
def test_a_mirrored_vehicle_is_seen_from_its_other_side(seen, in_the_mirror):
    assert mirror(Sight(seen, "fog", "pole", 0.5)) == Sight(in_the_mirror, "fog", "pole", 0.5)


def test_a_mirrored_picture_is_described_as_it_is(pictures):
    row = next(row for row, sight in enumerate(pictures.sights) if sight.view in (2, 5))
    plain, mirrored = (
        " ".join(pictures.caption(row, np.random.default_rng(n), flip) for n in range(20)) for flip in (False, True)
    )
    ours, theirs = ("left", "right") if pictures.sights[row].view == 2 else ("right", "left")
    assert f"from the {ours}" in plain and f"from the {theirs}" not in plain
    assert f"from the {theirs}" in mirrored and f"from the {ours}" not in mirrored


def test_the_vocabulary_keeps_the_order_of_entries_so_that_the_end_is_the_last():
    texts = tokenize(["A photo of a red van.", "A van."])
    vocabulary = Vocabulary([entry for text in texts for entry in text])
    packed = vocabulary.pack(texts)
    assert [
        [vocabulary.ids[place] for place in row[: len(text)]] for row, text in zip(packed, texts, strict=True)
    ] == texts
    assert packed.argmax(1).tolist() == [len(text) - 1 for text in texts]


def test_a_text_that_is_too_long_is_cut_before_its_end(words):
    (text,) = tokenize(["A photo of a red van. " * 20])
    (row,) = words.pack([text]).tolist()
    assert [words.ids[place] for place in row] == [*text[: LENGTH - 1], text[-1]]


def test_captions_and_questions_have_words_of_the_vocabulary_and_few_are_cut(pictures, words):
    captions = [pictures.caption(row % 16, np.random.default_rng(row)) for row in range(2000)]
    texts = tokenize([*captions, *(text for texts in TEXTS.values() for text in texts)])
    assert {entry for text in texts for entry in text} <= set(words.ids)
    assert sum(len(text) > LENGTH for text in texts) <= 10


def test_a_stopped_training_ends_with_the_weights_of_one_that_was_not(pictures, words, clip, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(pictures, words, tmp_path / "checkpoint.pt", stop_after=1)
    resumed, told = trained(pictures, words, tmp_path / "checkpoint.pt")
    assert [epoch.epoch for epoch in told] == [2, 3]
    assert all(torch.equal(value, clip.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_a_checkpoint_of_another_recipe_is_not_taken(pictures, words, tmp_path):
    trained(pictures, words, tmp_path / "checkpoint.pt", epochs=1)
    assert [epoch.epoch for epoch in trained(pictures, words, tmp_path / "checkpoint.pt", epochs=2)[1]] == [1, 2]


def test_training_pulls_pictures_and_their_captions_together(pictures, words, tmp_path):
    _, told = trained(pictures, words, tmp_path / "checkpoint.pt", epochs=12)
    assert told[-1].loss < told[0].loss - 0.1


def test_questions_are_answered_in_words_and_guessing_is_beside_it(pictures, words, clip):
    answers = ask(clip, pictures, words)
    assert {name: round(1 / answer.chance) for name, answer in answers.items()} == {
        "colour": 10,
        "body": 9,
        "direction": 8,
    }
    assert all(0 <= answer.right <= 1 and answer.commonest >= answer.chance for answer in answers.values())


def test_the_file_starts_a_run_with_the_trained_towers(pictures, words, clip, tmp_path):
    path, facts = tmp_path / "clip.safetensors", {"seed": 3, "epochs": 3}
    write_clip(path, clip.state_dict(), words, check_arch(ARCH), facts)
    assert path.stat().st_size < 1_000_000
    again = tmp_path / "again.safetensors"
    write_clip(again, clip.state_dict(), words, check_arch(ARCH), facts)
    assert again.read_bytes() == path.read_bytes()

    spec = model_spec(ARCH, image_size=(32, 32), identities=5, noun="vehicle")
    model, text, _ = build_models(spec, str(path))
    half = new_clip(check_arch(ARCH), words, seed=0)
    half.load_state_dict(rounded(clip.state_dict()))
    images = normalise(pictures.pixels, MEAN, STD)
    with torch.no_grad():
        assert torch.allclose(model.eval().features(images).proj, half.encode_image(images), atol=1e-5)
        # The prompt whose tokens are words is the text with these words.
        said = tokenize(["A photo of a red blue van bus vehicle."])
        rows = half.token_embedding(torch.tensor([[words.place[entry] for entry in said[0]]]))
        features = half.encode_text(words.pack(said))
        assert torch.allclose(text(rows[:, 5:9]), features, atol=1e-5)


def test_facts_of_its_making_stand_in_the_file(words, clip, tmp_path):
    from clipreid.weights.sealed import read_header

    write_clip(tmp_path / "clip.safetensors", clip.state_dict(), words, check_arch(ARCH), {"seed": 3, "epochs": 3})
    assert json.loads(read_header(tmp_path / "clip.safetensors").metadata["made"]) == {"seed": 3, "epochs": 3}
