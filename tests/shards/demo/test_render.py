"""The demo dataset: its pictures depend on numbers alone, and its folder is VeRi-776's (or VehicleID's)."""

import json
import time
from collections import Counter
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from shards.datasets.veri776 import Veri776
from shards.demo import dataset as render
from shards.demo.dataset import render_dataset
from shards.demo.looks import draw_looks
from shards.demo.scene import VIEWS, get_camera, take_photo
from shards.demo.vehicle import build_vehicle
from shards.errors import DataError
from shards.storage import Source

SMALL = {"identities": 8, "cameras": 3, "images": 7, "seed": 5}
LEFT, RIGHT, FRONT, REAR = 2, 5, 0, 1


@pytest.fixture(scope="module")
def veri(tmp_path_factory):
    out = tmp_path_factory.mktemp("render") / "VeRi"
    assert render_dataset(out, **SMALL, processes=1)
    return out


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder, split):
    return (folder / f"name_{split}.txt").read_text().splitlines()


def keypoint_lines(folder):
    for name in ("train", "test"):
        for line in (folder / f"keypoint_{name}.txt").read_text().splitlines():
            yield line.split(" ")


def test_every_file_is_the_same_for_one_and_two_processes(veri, tmp_path):
    render_dataset(tmp_path / "two", **SMALL, processes=2)
    assert contents(tmp_path / "two") == contents(veri)


def test_an_identity_looks_the_same_whatever_the_number_of_identities(veri, tmp_path):
    render_dataset(tmp_path / "fewer", **SMALL | {"identities": 2}, processes=1)
    first = [name for name in names(veri, "train") if name.startswith("0001_")]
    assert names(tmp_path / "fewer", "train") == first
    for name in first:
        assert (tmp_path / "fewer/image_train" / name).read_bytes() == (veri / "image_train" / name).read_bytes()


def test_another_seed_gives_other_vehicles():
    assert draw_looks(0, 1) != draw_looks(1, 1)
    assert draw_looks(0, 1) == draw_looks(0, 1)


def test_name_files_list_their_folders(veri):
    for split in ("train", "query", "test"):
        assert names(veri, split) == sorted(p.name for p in (veri / f"image_{split}").iterdir())
    assert len(names(veri, "train")) == len(names(veri, "test")) == 4 * 7
    assert len(names(veri, "query")) == 4 * 3  # one of each test identity and camera


def test_training_and_test_identities_are_disjoint(veri):
    train, query, test = ({name[:4] for name in names(veri, split)} for split in ("train", "query", "test"))
    assert train == {"0001", "0002", "0003", "0004"}
    assert query == test == {"0005", "0006", "0007", "0008"}


def test_queries_are_in_the_gallery_too_and_have_a_match_under_another_camera(veri):
    for name in names(veri, "query"):
        identity, camera = name.split("_")[:2]
        assert (veri / "image_query" / name).read_bytes() == (veri / "image_test" / name).read_bytes()
        assert any(o.startswith(identity) and o.split("_")[1] != camera for o in names(veri, "test"))


def test_label_files_are_declared_gb2312_and_name_every_image(veri):
    for split in ("train", "test"):
        text = (veri / f"{split}_label.xml").read_bytes().decode("gb2312")
        head, body = text.split("\n", 1)
        assert head == '<?xml version="1.0" encoding="gb2312"?>'
        (items,) = ElementTree.fromstring(body)
        assert int(items.get("number")) == len(items)
        assert [item.get("imageName") for item in items] == names(veri, split)
        for item in items:
            identity, camera = item.get("imageName").split("_")[:2]
            assert (item.get("vehicleID"), item.get("cameraID")) == (identity, camera)
            assert 1 <= int(item.get("colorID")) <= 10 and 1 <= int(item.get("typeID")) <= 9


def test_key_point_files_give_42_fields_and_points_inside_the_picture(veri):
    lines = list(keypoint_lines(veri))
    assert {fields[0] for fields in lines} == {
        f"image_{split}/{name}" for split in ("train", "query", "test") for name in names(veri, split)
    }
    for fields in lines:
        assert len(fields) == 42 and 0 <= int(fields[41]) <= 7
        points = np.array(fields[1:41], dtype=int).reshape(20, 2)
        seen = (points >= 0).all(axis=1)
        assert (points[~seen] == -1).all() and seen.sum() >= 3
        assert (points[seen] < Image.open(veri / fields[0]).size).all()


def test_the_view_says_which_side_is_in_the_picture():
    """Key points of a side (VeRi-776's order: wheels left and right, lamps front and rear) face only their views."""
    photos = [
        take_photo(build_vehicle(draw_looks(0, i)), get_camera(0, i % 8), np.random.default_rng(i))
        for i in range(1, 161)
    ]
    assert {photo.view for photo in photos} == set(VIEWS)
    sides = {LEFT: (0, 1), RIGHT: (2, 3), FRONT: (6, 7), REAR: (16, 17)}
    opposite = {LEFT: RIGHT, RIGHT: LEFT, FRONT: REAR, REAR: FRONT}
    for photo in photos:
        if photo.view in sides:
            shown = {side: (photo.keypoints[list(points)] >= 0).any() for side, points in sides.items()}
            assert shown[photo.view] and not shown[opposite[photo.view]]


def test_a_camera_sees_at_most_three_adjacent_directions(veri):
    seen = {}
    for fields in keypoint_lines(veri):
        seen.setdefault(fields[0].split("_")[2], set()).add(VIEWS.index(int(fields[41])))
    assert len(seen) == 3
    for eighths in seen.values():
        assert any(eighths <= {(middle + step) % 8 for step in (-1, 0, 1)} for middle in range(8))


def test_cameras_differ_and_so_do_photos_of_one_camera():
    model = build_vehicle(draw_looks(0, 1))
    photos = [take_photo(model, get_camera(0, camera), np.random.default_rng(n)) for camera in (0, 1) for n in (0, 1)]
    assert len({photo.image.tobytes() for photo in photos}) == 4
    assert photos[0].quality == photos[1].quality  # a camera's own
    assert all(50 <= photo.image.width <= 260 for photo in photos)


def test_identities_share_colour_and_shape_but_no_two_look_alike():
    looks = [draw_looks(0, identity) for identity in range(1, 101)]
    common = Counter((one.colour, one.shape) for one in looks)
    assert sum(count for count in common.values() if count >= 2) >= 50  # colour and shape settle less than half
    assert all(a != b for a, b in combinations(looks, 2))
    marks = [
        sum(getattr(one, m) is not None for m in ("roof", "skirt", "stripe", "band", "emblem", "load")) for one in looks
    ]
    assert min(marks) >= 3


def test_the_parser_of_the_real_dataset_reads_it(veri):
    views = (str(veri / "keypoint_train.txt"), str(veri / "keypoint_test.txt"))
    warnings = []
    records = list(Veri776(views=views).records(Source(str(veri)), warnings.append))
    assert not warnings
    assert Counter(record.split for record in records) == {"train": 28, "query": 12, "gallery": 28}
    assert {record.camera for record in records} == {0, 1, 2}
    assert all(0 <= record.view <= 7 and record.attributes for record in records)


def test_vehicleid_layout_lists_every_image_once_and_nests_its_test_lists(tmp_path):
    out = tmp_path / "VehicleID_V1.0"
    render_dataset(out, **SMALL, layout="vehicleid", processes=1)
    lists = {p.stem: p.read_text().splitlines() for p in (out / "train_test_split").iterdir()}
    assert set(lists) == {"train_list", "test_list_800", "test_list_1600", "test_list_2400"}
    assert sorted(lists["train_list"] + lists["test_list_2400"]) == [f"{n + 1:07d} {n // 7 + 1}" for n in range(56)]
    assert set(lists["test_list_800"]) < set(lists["test_list_1600"]) < set(lists["test_list_2400"])
    assert sorted(p.name for p in (out / "image").iterdir()) == [f"{n + 1:07d}.jpg" for n in range(56)]
    assert len((out / "attribute/img2vid.txt").read_text().splitlines()) == 56


def test_a_finished_folder_is_kept_and_other_settings_are_refused(veri):
    before = {p: p.stat().st_mtime_ns for p in veri.rglob("*")}
    assert render_dataset(veri, **SMALL) is False
    with pytest.raises(DataError, match=r"VeRi.*cameras 3 not 4.*--out"):
        render_dataset(veri, **SMALL | {"cameras": 4})
    assert {p: p.stat().st_mtime_ns for p in veri.rglob("*")} == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="was not rendered here; give another --out"):
        render_dataset(tmp_path, **SMALL)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_stopped_render_leaves_no_folder_and_the_next_one_finishes(veri, tmp_path, monkeypatch):
    out, draw = tmp_path / "out", render.draw_looks

    def stop_at_the_third(seed, identity):
        if identity == 3:
            raise KeyboardInterrupt
        return draw(seed, identity)

    monkeypatch.setattr(render, "draw_looks", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        render_dataset(out, **SMALL, processes=1)
    assert not out.exists()
    monkeypatch.undo()
    render_dataset(out, **SMALL, processes=1)
    assert contents(out) == contents(veri)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identities": 1}, "identities is 1, must be 2 to 9999"),
        ({"cameras": 1}, "cameras is 1, must be 2 to 20"),
        ({"cameras": 21}, "cameras is 21, must be 2 to 20"),
        ({"images": 1}, "images is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"layout": "veri"}, "layout is 'veri'; known: veri776, vehicleid"),
    ],
)
def test_impossible_settings_are_named_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        render_dataset(tmp_path / "out", **SMALL | change)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_settings_of_the_folder_are_written_beside_the_images(veri):
    found = json.loads((veri / "render.json").read_text())
    assert {key: found[key] for key in SMALL} == SMALL


def test_a_hundred_photos_take_a_few_seconds():
    """Five times the time that 1,000 images in 20 s allow, for slow machines."""
    model = build_vehicle(draw_looks(0, 1))
    for camera in range(6):
        get_camera(0, camera)
    start = time.process_time()
    for number in range(100):
        take_photo(model, get_camera(0, number % 6), np.random.default_rng(number))
    assert time.process_time() - start < 10
