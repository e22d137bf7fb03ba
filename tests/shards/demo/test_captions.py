"""Captions say what was drawn, in varied words, beside the images and in the shards, and change nothing else."""

import csv
import json
import re

import numpy as np
import pytest
from open_clip import SimpleTokenizer
from PIL import Image

from shards.demo.captions import DIRECTIONS, TEMPLATES, all_words, describe
from shards.demo.dataset import render_dataset
from shards.demo.looks import COLOURS, SHAPES, draw_looks
from shards.demo.scene import HIDDEN, WEATHER, Sight
from shards.errors import DataError
from shards.format import tar_members
from shards.packing.build import build
from shards.packing.verify import verify

SMALL = {"identities": 4, "cameras": 3, "images": 4, "seed": 5}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The same pictures without captions and with them."""
    root = tmp_path_factory.mktemp("captions")
    for name, captions in (("plain", False), ("told", True)):
        render_dataset(root / name, **SMALL, captions=captions, processes=1)
    return root


def told(folder):
    with (folder / "captions.csv").open(newline="") as file:
        return {row["path"]: row["caption"] for row in csv.DictReader(file)}


def pack(folder, out, **settings):
    return build("veri776", [str(folder)], str(out), processes=1, **settings)


def many():
    for identity in range(1, 300):
        rng = np.random.default_rng(identity)
        sight = Sight(identity % 8, str(rng.choice(WEATHER)), str(rng.choice(HIDDEN)), float(rng.uniform(0.2, 0.8)))
        looks = draw_looks(1, identity)
        yield looks, sight, describe(looks, sight, rng)


def test_captions_are_a_table_beside_images_that_are_the_same_without_them(rendered):
    files = {
        name: {p.relative_to(rendered / name): p for p in (rendered / name).rglob("*") if p.is_file()}
        for name in ("plain", "told")
    }
    assert {str(name) for name in files["told"].keys() - files["plain"].keys()} == {"captions.csv"}
    differing = [
        str(name) for name, path in files["plain"].items() if path.read_bytes() != files["told"][name].read_bytes()
    ]
    assert differing == ["render.json"]
    assert set(told(rendered / "told")) == {str(name) for name in files["told"] if name.suffix == ".jpg"}


def test_the_same_seed_gives_the_same_captions_for_one_and_two_processes(rendered, tmp_path):
    render_dataset(tmp_path / "two", **SMALL, captions=True, processes=2)
    assert (tmp_path / "two/captions.csv").read_bytes() == (rendered / "told/captions.csv").read_bytes()


def test_a_caption_names_nothing_that_was_not_drawn():
    for looks, sight, caption in many():
        words = set(re.findall(r"[a-z]+", caption.lower()))
        assert words & SHAPES.keys() <= {looks.shape}
        assert ("rain" in words) <= (sight.weather == "rain") and ("leaves" in words) <= (sight.hidden == "leaves")
        if "seen from" in caption.lower():
            assert (
                re.search(r"seen from the ((?:left|right|front|rear| )+)", caption.lower())[1].strip()
                == DIRECTIONS[sight.view]
            )
        assert looks.stripe or not words & {"stripe", "stripes", "striped"}
        assert looks.load or not words & {"kayak", "ladder", "luggage", "loaded"}


def test_some_captions_tell_no_more_than_body_and_direction_and_some_nearly_all():
    captions = [(looks, caption) for looks, _, caption in many()]
    silent = [caption for looks, caption in captions if looks.colour not in caption and "with" not in caption]
    assert len(silent) > 30 and any(re.fullmatch(r"An? \w+, seen from the [a-z ]+\.", caption) for caption in silent)
    assert sum(caption.count(",") > 3 for _, caption in captions) > 20


def test_captions_vary_and_fit_into_the_text_tower():
    captions = [caption for *_, caption in many()]
    tokenizer = SimpleTokenizer()
    assert len(set(captions)) > 230 and len({caption.split(" ")[0] for caption in captions}) > 2
    assert max(len(tokenizer.encode(caption)) for caption in captions) <= 75
    assert len(TEMPLATES) >= 5 and all(colour in " ".join(captions) for colour in COLOURS)
    assert not any(re.search(r"\b[Aa] [aeio]", caption) for caption in captions)


def test_all_words_are_all_that_captions_have():
    def words(text):
        return set(re.findall(r"[a-z0-9]+|[.,:]", text.lower()))

    known, used = words(all_words()), set().union(*(words(caption) for *_, caption in many()))
    assert used <= known and len(known - used) <= 5


def test_shards_hold_captions_where_asked_for_and_else_the_same_bytes(rendered, tmp_path):
    pack(rendered / "plain", tmp_path / "plain")
    pack(rendered / "told", tmp_path / "silent")
    pack(rendered / "told", tmp_path / "told", captions=str(rendered / "told/captions.csv"))
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "silent" / path.name).read_bytes() == path.read_bytes(), path.name
    captions = told(rendered / "told")
    members = [m for tar in sorted((tmp_path / "told").glob("*.tar")) for m in tar_members(tar.read_bytes())]
    facts = [json.loads(data) for name, data in members if name.endswith(".json")]
    assert len(facts) == len(captions) and all(captions[one["path"]] == one["caption"] for one in facts)
    assert not verify(str(tmp_path / "told"), decode_all=True, processes=1).problems


def test_other_captions_are_another_source(rendered, tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text((rendered / "told/captions.csv").read_text())
    pack(rendered / "told", tmp_path / "out", captions=str(table))
    assert pack(rendered / "told", tmp_path / "out", captions=str(table)).images_written == 0
    table.write_text(table.read_text().replace(" seen ", " looked at "))
    with pytest.raises(DataError, match="the source has changed"):
        pack(rendered / "told", tmp_path / "out", captions=str(table))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,words\na.jpg,b\n", "its columns are path, words; they must be path,caption"),
        ("path,caption\na.jpg,b,c\n", "row 1: 3 cells for 2 columns"),
        ("path,caption\na.jpg,b\na.jpg,c\n", "row 2: a.jpg has a caption already, another one"),
        ("path,caption\na.jpg,b\n", r"22 images have no caption there: image_train/"),
    ],
)
def test_a_faulty_table_is_named_before_anything_is_packed(rendered, tmp_path, text, message):
    table = tmp_path / "captions.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=message):
        pack(rendered / "told", tmp_path / "out", captions=str(table))
    assert not (tmp_path / "out").exists()


def test_captions_asked_for_later_are_refused_by_name(rendered):
    with pytest.raises(DataError, match=r"captions None not True"):
        render_dataset(rendered / "plain", **SMALL, captions=True)
    with pytest.raises(DataError, match=r"captions True not None"):
        render_dataset(rendered / "told", **SMALL)


def test_vehicleid_layout_has_captions_too(tmp_path):
    render_dataset(tmp_path / "out", **SMALL, layout="vehicleid", captions=True, processes=1)
    assert set(told(tmp_path / "out")) == {f"image/{n + 1:07d}.jpg" for n in range(16)}
    assert Image.open(tmp_path / "out/image/0000001.jpg").size
