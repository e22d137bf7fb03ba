"""Parsers: generated folders in each dataset's layout, with strays, odd names and missing files."""

import os
import re
import shutil
import zipfile

import fsspec
import pyarrow.csv
import pyarrow.parquet
import pytest

from shards.datasets import DATASETS
from shards.datasets.joint import read_collection
from shards.errors import DataError
from tests.helpers.layouts import (
    VERI_NAMES,
    VIEWS_LINE,
    image_bytes,
    make_duke,
    make_manifest,
    make_market,
    make_msmt17,
    make_vehicleid,
    make_veri,
    write,
)

MAKERS = {
    "market1501": (make_market, "Market-1501-v15.09.15"),
    "dukemtmc": (make_duke, "DukeMTMC-reID"),
    "occluded_duke": (make_duke, "Occluded_Duke"),
    "msmt17": (make_msmt17, "MSMT17_V1"),
    "veri776": (make_veri, "VeRi"),
    "vehicleid": (make_vehicleid, "VehicleID_V1.0"),
}


def read(name, *roots, **options):
    return read_collection(name, [str(root) for root in roots], options)


def rows(collection, split):
    """(file name, identity, camera) of a split, sorted."""
    found = [(r.path.rsplit("/", 1)[-1], r.identity, r.camera) for r in collection.records if r.split == split]
    return sorted(found)


def fails(pattern, name, *roots, **options):
    with pytest.raises(DataError, match=pattern) as caught:
        read(name, *roots, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_market1501_drops_junk_keeps_distractors_and_counts_cameras_from_0(tmp_path):
    market = read("market1501", make_market(tmp_path))
    assert (market.noun, market.cameras, market.views) == ("person", 6, 0)
    assert rows(market, "train") == [
        ("0002_c1s1_000451_03.jpg", "0002", 0),
        ("0002_c2s1_000451_01.jpg", "0002", 1),
        ("0007_c3s3_077419_03.jpg", "0007", 2),
        ("0007_c6s3_077419_03.jpg", "0007", 5),
    ]
    assert [identity for _, identity, _ in rows(market, "gallery")] == ["0000", "0001", "0003"]


def test_dukemtmc_identity_camera_and_frame(tmp_path):
    duke = read("dukemtmc", make_duke(tmp_path))
    assert duke.cameras == 8
    assert rows(duke, "train")[:2] == [("0001_c2_f0046182.jpg", "0001", 1), ("0001_c8_f0046302.jpg", "0001", 7)]
    assert next(r.time for r in duke.records if r.split == "query") == "0046985"


@pytest.mark.parametrize("name", MAKERS)
def test_the_root_may_be_the_dataset_its_parent_or_a_zip_of_either(name, tmp_path):
    make, folder = MAKERS[name]
    make(tmp_path / folder)
    inside = read(name, tmp_path / folder)
    above = read(name, tmp_path)
    assert [r.path for r in above.records] == [f"{folder}/{r.path}" for r in inside.records]
    shutil.make_archive(str(tmp_path / "all"), "zip", tmp_path, folder)
    zipped = read(name, tmp_path / "all.zip")
    assert zipped.records == above.records
    first = above.records[0].path
    assert zipped.sources[""].read(first) == above.sources[""].read(first) == (tmp_path / first).read_bytes()


@pytest.mark.parametrize(("name", "folder"), [("dukemtmc", "DukeMTMC-reID"), ("occluded_duke", "Occluded_Duke")])
def test_duke_is_also_found_below_dukemtmcreid(name, folder, tmp_path):
    make_duke(tmp_path / "dukemtmcreid" / folder)
    assert len(read(name, tmp_path).records) == 7


@pytest.mark.parametrize("name", MAKERS)
def test_records_do_not_depend_on_the_order_of_the_file_system(name, tmp_path, monkeypatch):
    make, _ = MAKERS[name]
    make(tmp_path)
    expected = read(name, tmp_path).records
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: sorted(scandir(path), key=lambda e: e.name, reverse=True))
    assert read(name, tmp_path).records == expected


@pytest.mark.parametrize(
    ("name", "folder", "odd", "form"),
    [
        ("market1501", "query", "0002_c7s1_000451_03.jpg", "0002_c1s1_000451_03.jpg"),
        ("market1501", "query", "x0002_c1s1_000451_03.jpg", "0002_c1s1_000451_03.jpg"),
        ("dukemtmc", "bounding_box_test", "0001_c2_f0046182 (1).jpg", "0001_c2_f0046182.jpg"),
        ("occluded_duke", "query", "0001_c9_f0046182.jpg", "0001_c2_f0046182.jpg"),
        ("veri776", "image_train", "0002_c021_00030600_0.jpg", "0002_c002_00030600_0.jpg"),
    ],
)
def test_odd_names_are_an_error_that_lists_five_and_the_form(name, folder, odd, form, tmp_path):
    make, _ = MAKERS[name]
    make(tmp_path)
    write(tmp_path / folder / odd, image_bytes())
    assert odd in fails(re.escape(form), name, tmp_path)
    for number in range(7):
        write(tmp_path / folder / f"copy of {number}.jpg", image_bytes())
    message = fails("and 3 more", name, tmp_path)
    assert len(re.findall(r"copy of \d\.jpg|" + re.escape(odd), message)) == 5


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("market1501", "bounding_box_test"),
        ("dukemtmc", "query"),
        ("occluded_duke", "bounding_box_train"),
        ("veri776", "image_query"),
        ("vehicleid", "train_test_split"),
        ("msmt17", "test"),
    ],
)
def test_a_missing_folder_is_named(name, missing, tmp_path):
    make, _ = MAKERS[name]
    make(tmp_path)
    shutil.rmtree(tmp_path / missing)
    assert str(tmp_path) in fails(missing, name, tmp_path)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        (name, path)
        for name, path in [
            *(("msmt17", f"list_{part}.txt") for part in ("train", "val", "query", "gallery")),
            ("vehicleid", "train_test_split/train_list.txt"),
        ]
    ],
)
def test_a_missing_list_is_named(name, missing, tmp_path):
    make, _ = MAKERS[name]
    make(tmp_path)
    (tmp_path / missing).unlink()
    fails(f"{re.escape(missing)}: no such file", name, tmp_path)


def test_a_missing_root_is_named_and_an_empty_split_warned_of(tmp_path):
    fails("no/such/place: no such folder", "market1501", "no/such/place")
    make_market(tmp_path)
    for folder in ("query", "bounding_box_train", "bounding_box_test"):
        assert read("market1501", tmp_path).records
        for image in (tmp_path / folder).glob("*_*.jpg"):
            image.unlink()
        if folder == "query":
            assert "split query is empty: the dataset can't be evaluated with" in read("market1501", tmp_path).warnings
    fails("market1501 at .*: holds no images", "market1501", tmp_path)


def test_unknown_dataset_lists_the_known_ones(tmp_path):
    assert all(name in fails("'market' is not known", "market", tmp_path) for name in DATASETS)


@pytest.mark.parametrize(
    ("base", "folders", "suffix"),
    [
        ("MSMT17", ("train", "test"), ""),
        ("MSMT17_V1", ("train", "test"), ""),
        ("MSMT17_V2", ("mask_train_v2", "mask_test_v2"), "_ex"),
        ("", ("mask_train_v2", "mask_test_v2"), ""),
    ],
)
def test_msmt17_versions_take_identities_from_the_lists(base, folders, suffix, tmp_path):
    make_msmt17(tmp_path / base, folders, suffix)
    merged = read("msmt17", tmp_path)
    assert merged.cameras == 15
    assert [(i, c) for _, i, c in rows(merged, "train")] == [
        ("train/0000", 0),
        ("train/0000", 1),
        ("train/0001", 14),
        ("train/0001", 2),
    ]
    assert rows(merged, "query")[0][1:] == ("test/0000", 0)
    assert rows(merged, "gallery")[0][1:] == ("test/0000", 3)
    assert merged.records[0].time == "0303morning"
    assert len(rows(read("msmt17", tmp_path, msmt17_val="leave"), "train")) == 2


def test_msmt17_list_faults_name_the_line_or_the_image(tmp_path):
    make_msmt17(tmp_path)
    listed = (tmp_path / "list_query.txt").read_text()
    write(tmp_path / "list_query.txt", listed + "0000/0000_005_01_0303morning_0015_0.jpg 0\n")
    fails("0000_005_01.*incomplete", "msmt17", tmp_path)
    write(tmp_path / "list_query.txt", listed + "nonsense\n")
    fails("list_query.txt, line 2: expected `PATH LABEL`", "msmt17", tmp_path)
    write(tmp_path / "list_query.txt", listed + listed)
    fails("line 2: .* is listed twice", "msmt17", tmp_path)
    write(tmp_path / "list_query.txt", listed)
    write(tmp_path / "test" / "0000" / "0000_000_16_0303morning_0015_0.jpg", image_bytes())
    write(tmp_path / "list_query.txt", listed + "0000/0000_000_16_0303morning_0015_0.jpg 0\n")
    fails("not of the form 0000/0000_000_01_.*0000_000_16_", "msmt17", tmp_path)
    write(tmp_path / "list_query.txt", listed)
    trained, validated = (tmp_path / f"list_{name}.txt" for name in ("train", "val"))
    write(validated, validated.read_text() + trained.read_text().splitlines()[1] + "\n")
    fails("list_val.txt: train/0001/0001_000_15_.* is listed twice, before in list_train.txt", "msmt17", tmp_path)
    assert len(rows(read("msmt17", tmp_path, msmt17_val="leave"), "train")) == 2


def views_of(root):
    return (str(root / "keypoint_train.txt"), str(root / "keypoint_test.txt"))


def test_veri776_views_come_from_the_keypoint_files(tmp_path):
    make_veri(tmp_path)
    plain = read("veri776", tmp_path)
    assert (plain.cameras, plain.views, {r.view for r in plain.records}) == (20, 0, {-1})
    veri = read("veri776", tmp_path, views=views_of(tmp_path))
    assert veri.views == 8
    assert [(r.split, r.view) for r in veri.records] == [
        ("train", 3),
        ("train", 3),
        ("train", 3),
        ("train", 3),
        ("query", 7),
        ("gallery", 7),
        ("gallery", -1),
    ]
    assert any("1 images without a view label kept" in line for line in veri.warnings)
    dropped = read("veri776", tmp_path, views=views_of(tmp_path), drop_unlabelled=True)
    assert len(dropped.records) == 6
    assert veri.records[0].attributes == (("color", "1"), ("type", "4"))
    assert veri.records[0].time == "00016450"
    assert veri.records[1].camera == 19


def test_veri776_view_faults_name_the_line(tmp_path):
    make_veri(tmp_path)
    fails("--drop-unlabelled needs the view labels", "veri776", tmp_path, drop_unlabelled=True)
    name = VERI_NAMES["train"][0]
    write(tmp_path / "v.txt", f"a/{name} {VIEWS_LINE} 8\n")
    fails(
        "v.txt, line 1: expected PATH, 40 numbers and a view 0-7",
        "veri776",
        tmp_path,
        views=(f"{tmp_path}/v.txt",),
    )
    write(tmp_path / "v.txt", f"a/{name} {VIEWS_LINE} ²\n")
    fails("v.txt, line 1: expected PATH", "veri776", tmp_path, views=(f"{tmp_path}/v.txt",))
    write(tmp_path / "v.txt", f"a/{name} {VIEWS_LINE} 1\n\na/{name} {VIEWS_LINE} 2\n")
    fails("line 3: .* has view 2, before it had 1", "veri776", tmp_path, views=(f"{tmp_path}/v.txt",))
    fails("nothere.txt: no such file", "veri776", tmp_path, views=(f"{tmp_path}/nothere.txt",))


def test_veri776_view_files_that_name_no_image_are_told(tmp_path):
    make_veri(tmp_path)
    other = tmp_path / "other.txt"
    write(other, f"a/0009_c001_00000001_0.jpg {VIEWS_LINE} 1\n")
    fails(f"--views {other}: no image of {tmp_path} is named there", "veri776", tmp_path, views=(str(other),))
    kept = read("veri776", tmp_path, views=(*views_of(tmp_path), str(other)))
    assert f"--views {other} names none of the images" in kept.warnings
    assert not any(
        "none of the images" in line for line in read("veri776", tmp_path, views=views_of(tmp_path)).warnings
    )


def test_veri776_name_files_tell_an_incomplete_copy(tmp_path):
    make_veri(tmp_path)
    (tmp_path / "image_test" / VERI_NAMES["test"][1]).unlink()
    fails(f"name_test.txt: lists images that are not there: .*{VERI_NAMES['test'][1]}", "veri776", tmp_path)
    (tmp_path / "name_test.txt").unlink()
    assert any("name_test.txt is missing" in line for line in read("veri776", tmp_path).warnings)


def test_vehicleid_test_images_know_their_lists_and_attributes(tmp_path):
    vehicleid = read("vehicleid", make_vehicleid(tmp_path))
    assert (vehicleid.noun, vehicleid.cameras, vehicleid.warnings) == ("vehicle", 0, [])
    train = [r for r in vehicleid.records if r.split == "train"]
    assert [(r.identity, r.camera, r.lists) for r in train] == [("10", -1, "")] * 2 + [("9", -1, "")] * 2
    assert train[0].attributes == (("color", "3"), ("model", "41"))
    assert {(r.path, r.identity, r.lists) for r in vehicleid.records if r.split == "test"} == {
        ("image/0000011.jpg", "20", "800,1600,2400"),
        ("image/0000012.jpg", "20", "800,1600,2400"),
        ("image/0000013.jpg", "21", "1600,2400"),
        ("image/0000014.jpg", "21", "1600,2400"),
        ("image/0000015.jpg", "22", "2400"),
        ("image/0000016.jpg", "22", "2400"),
    }


def test_vehicleid_lists_missing_odd_and_contradicting(tmp_path):
    make_vehicleid(tmp_path)
    lists = tmp_path / "train_test_split"
    (lists / "test_list_1600.txt").unlink()
    assert any("test_list_1600.txt is missing: no medium test" in line for line in read("vehicleid", tmp_path).warnings)
    write(lists / "test_list_1600.txt", "0000011 21\n")
    fails("test_list_1600.txt: image/0000011.jpg has identity 21, in another test list 20", "vehicleid", tmp_path)
    write(lists / "test_list_1600.txt", "0000011\n")
    fails("test_list_1600.txt, line 1: expected `IMAGE IDENTITY`", "vehicleid", tmp_path)
    write(lists / "test_list_1600.txt", "0000099 20\n")
    fails("lists images that are not there: image/0000099.jpg", "vehicleid", tmp_path)
    for path in lists.glob("test_list_*.txt"):
        path.unlink()
    assert any("split test is empty" in line for line in read("vehicleid", tmp_path).warnings)


def test_counts_other_than_the_published_are_notes_not_warnings(tmp_path):
    vehicleid = read("vehicleid", make_vehicleid(tmp_path))
    assert vehicleid.warnings == []
    assert "train 4/2 (published 113,346/13,164)" in vehicleid.notes[0]
    assert "test list 1600 4/2 (published 13,377/1,600)" in vehicleid.notes[0]


def test_manifest_csv_and_parquet_say_the_same(tmp_path):
    table = make_manifest(tmp_path)
    from_csv = read("manifest", table)
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(table), tmp_path / "images.parquet")
    assert read("manifest", tmp_path / "images.parquet").records == from_csv.records
    assert (from_csv.noun, from_csv.cameras, from_csv.views) == ("object", 2, 0)
    assert from_csv.records[0].identity == "id 0000"
    shutil.move(tmp_path / "crops", tmp_path / "elsewhere" / "crops")
    moved = read("manifest", table, tmp_path / "elsewhere")
    assert moved.sources[""].read(moved.records[0].path) == image_bytes(0)


def test_manifest_optional_cells_may_be_empty(tmp_path):
    lines = [
        "path,identity,split,view,camera,time",
        "a.jpg,x,train,1.0,,noon",
        "b.jpg,y,query,,3,",
        "c.png,y,gallery,,-1,",
    ]
    write(tmp_path / "m.csv", "\ufeff" + "\r\n".join(lines) + "\r\n")
    manifest = read("manifest", tmp_path / "m.csv")
    assert [(r.camera, r.view, r.time) for r in manifest.records] == [(-1, 1, "noon"), (3, -1, ""), (-1, -1, "")]
    assert (manifest.cameras, manifest.views) == (4, 2)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("/abs/a.jpg,x,train,0", "row 2: path '/abs/a.jpg' must be posix and relative"),
        ("../a.jpg,x,train,0", "must be posix and relative"),
        ("a.jpg,x,val,0", "split 'val' is not one of train, query, gallery"),
        ("a.jpg,,train,0", "row 2: identity is empty, which is none: leave the image out, or give it one"),
        ("a.jpg,-1,gallery,0", "row 2: identity is -1, which is none"),
        ("a.jpg,x,train,c1", "camera is 'c1', not a number"),
        ("a.jpg,x,train", "3 cells for 4 columns"),
        ("a.jpg,x,train,10000", "row 2: camera is 10000, above 9,999"),
        ("a.jpg,x,train," + "9" * 5000, "row 2: camera is 9"),
        ("a.jpg,x,train,²", "camera is '²', not a number"),
        ('a.jpg,"x"y,train,0', "line 3: not readable as CSV"),
        ('a.jpg,"x,train,0', "line 3: not readable as CSV"),
    ],
)
def test_manifest_faults_name_the_row(line, fault, tmp_path):
    write(tmp_path / "m.csv", f"path,identity,split,camera\nok.jpg,x,train,0\n{line}\n")
    fails(fault, "manifest", tmp_path / "m.csv")


def test_manifest_columns_are_closed(tmp_path):
    write(tmp_path / "m.csv", "path,identity,split,cam\n")
    fails("unknown column cam; columns are", "manifest", tmp_path / "m.csv")
    write(tmp_path / "m.csv", "path,split\n")
    fails("lacks column identity", "manifest", tmp_path / "m.csv")
    write(tmp_path / "m.csv", "path,identity,split,path\n")
    fails("more than one column path", "manifest", tmp_path / "m.csv")
    write(tmp_path / "m.csv", "path,identity,split\né.jpg,x,train\n".encode("latin-1"))
    fails("m.csv, line 2: is not UTF-8 text .* byte 20", "manifest", tmp_path / "m.csv")
    write(tmp_path / "m.csv", "")
    fails("lacks column path, identity, split", "manifest", tmp_path / "m.csv")
    fails("nothere.csv: no such file", "manifest", tmp_path / "nothere.csv")
    fails("wants a table", "manifest", tmp_path)


def test_manifest_rows_without_anything_are_passed_over(tmp_path):
    lines = ["path,identity,split,camera", "a.jpg,x,train,0", "", "b.jpg,y,query,0", ",,,", "c.jpg,y,gallery,1", "   "]
    write(tmp_path / "m.csv", "\n".join(lines))
    assert [r.path for r in read("manifest", tmp_path / "m.csv").records] == ["a.jpg", "b.jpg", "c.jpg"]
    write(tmp_path / "m.csv", "\n".join([*lines, "d.jpg,z,nosplit,1"]))
    fails("row 7: split 'nosplit'", "manifest", tmp_path / "m.csv")


COLUMNS = {"path": ["a.jpg", "b.jpg", "c.jpg"], "identity": [7, 8, 8], "split": ["train", "query", "gallery"]}


def test_manifest_parquet_identities_may_be_whole_numbers_and_categories(tmp_path):
    table = pyarrow.table(
        COLUMNS | {"camera": [0.0, None, 2.0], "split": pyarrow.array(COLUMNS["split"]).dictionary_encode()}
    )
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    records = read("manifest", tmp_path / "m.parquet").records
    assert [(r.identity, r.split, r.camera) for r in records] == [
        ("7", "train", 0),
        ("8", "query", -1),
        ("8", "gallery", 2),
    ]


@pytest.mark.parametrize(
    ("column", "values", "kind"),
    [
        ("identity", [7.0, 8.0, 8.0], "double"),
        ("identity", [b"7", b"8", b"8"], "binary"),
        ("path", [b"a.jpg", b"b.jpg", b"c.jpg"], "binary"),
        ("time", [b"noon", b"noon", b"noon"], "binary"),
    ],
)
def test_manifest_parquet_columns_whose_text_is_not_certain_are_refused(column, values, kind, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table(COLUMNS | {column: values}), tmp_path / "m.parquet")
    fails(f"m.parquet: column {column} is of type {kind}", "manifest", tmp_path / "m.parquet")


def test_a_damaged_manifest_parquet_is_told_wherever_the_damage_is(tmp_path):
    path = tmp_path / "m.parquet"
    write(path, "no parquet")
    fails("not a Parquet file", "manifest", path)
    pyarrow.parquet.write_table(pyarrow.table(COLUMNS), path, compression="zstd")
    good = path.read_bytes()
    damaged = 0
    for position in range(4, len(good) - 8, 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :])
        try:
            read("manifest", path)
        except DataError as error:
            damaged += "not a Parquet file, or damaged" in str(error)
    assert damaged > 20


def test_a_broken_zip_is_told_as_a_whole_and_for_the_image_it_breaks(tmp_path):
    make_duke(tmp_path / "m")
    shutil.make_archive(str(tmp_path / "m"), "zip", tmp_path / "m")
    good = (tmp_path / "m.zip").read_bytes()
    write(tmp_path / "cut.zip", good[:-40])
    fails("cut.zip: not a readable zip file", "dukemtmc", tmp_path / "cut.zip")
    with zipfile.ZipFile(tmp_path / "m.zip") as file:
        image = next(info for info in file.infolist() if info.filename.endswith("f0001105.jpg"))
    start = image.header_offset + 200
    write(tmp_path / "bad.zip", good[:start] + bytes(20) + good[start + 20 :])
    duke = read("dukemtmc", tmp_path / "bad.zip")
    broken = []
    for record in duke.records:
        try:
            duke.sources[""].read(record.path)
        except OSError as error:
            broken.append(record.path)
            assert "the zip file is damaged there" in str(error)
    assert broken == [image.filename]


def test_a_link_to_a_folder_above_is_told_and_other_links_are_followed(tmp_path):
    make_market(tmp_path / "elsewhere")
    (tmp_path / "m").mkdir()
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / "m" / folder).symlink_to(tmp_path / "elsewhere" / folder)
    assert read("market1501", tmp_path / "m").records == read("market1501", tmp_path / "elsewhere").records
    (tmp_path / "elsewhere" / "query" / "again").symlink_to(tmp_path / "elsewhere")
    fails(
        "elsewhere/query/again/query: lies in itself",
        "market1501",
        tmp_path / "elsewhere",
    )


def test_a_joint_dataset_keeps_identities_cameras_and_paths_apart(tmp_path):
    make_market(tmp_path / "a"), make_msmt17(tmp_path / "b"), make_veri(tmp_path / "c")
    parts = [read("market1501", tmp_path / "a"), read("msmt17", tmp_path / "b"), read("veri776", tmp_path / "c")]
    joint = read(
        "market1501+msmt17+veri776",
        *(tmp_path / d for d in "abc"),
        views=views_of(tmp_path / "c"),
        msmt17_val="leave",
    )
    assert (joint.noun, joint.cameras, joint.views) == ("object", 6 + 15 + 20, 8)
    assert len(joint.records) == sum(len(part.records) for part in parts) - 2  # msmt17's validation images
    cameras = {}
    for record in joint.records:
        name = record.path.split("/")[0]
        assert record.identity.startswith(f"{name}/")
        cameras.setdefault(name, set()).add(record.camera)
    assert (
        max(cameras["market1501"])
        < 6
        <= min(cameras["msmt17"])
        <= max(cameras["msmt17"])
        < 21
        <= min(cameras["veri776"])
    )
    assert {r.view for r in joint.records if r.path.startswith("veri776")} == {3, 7, -1}
    assert read("market1501+msmt17", tmp_path / "a", tmp_path / "b").noun == "person"


def test_a_joint_dataset_may_hold_two_of_a_kind(tmp_path):
    first, second = make_manifest(tmp_path / "a"), make_manifest(tmp_path / "b")
    joint = read("manifest+manifest", first, second)
    assert {r.path.split("/")[0] for r in joint.records} == {"manifest", "manifest-2"}
    assert joint.cameras == 4


def test_joint_datasets_need_a_root_each_and_options_that_apply(tmp_path):
    fails("needs 2 --root, one each in the same order; got 1", "market1501+msmt17", tmp_path)
    fails("--views does not apply to --dataset market1501", "market1501", tmp_path, views=("x",))


def make_omniglot(root):
    for alphabet in ("Greek", "Latin"):
        for character in (1, 2):
            for drawer in range(1, 21):
                name = f"{alphabet}/character{character:02d}/{character:04d}_{drawer:02d}.png"
                write(root / "images_background_small1" / name, image_bytes(drawer, kind="PNG"))


def test_omniglot_trains_without_greek_and_asks_with_five_drawers(tmp_path):
    make_omniglot(tmp_path)
    omniglot = read("omniglot", tmp_path)
    assert (omniglot.noun, omniglot.cameras) == ("character", 20)
    assert {r.identity for r in omniglot.records if r.split == "train"} == {"Latin/character01", "Latin/character02"}
    assert {r.camera for r in omniglot.records if r.split == "query"} == set(range(5))
    assert {r.camera for r in omniglot.records if r.split == "gallery"} == set(range(5, 20))
    inside = read("omniglot", tmp_path / "images_background_small1")
    assert [(r.identity, r.camera, r.split) for r in inside.records] == [
        (r.identity, r.camera, r.split) for r in omniglot.records
    ]


@pytest.mark.skipif("OMNIGLOT_ZIP" not in os.environ, reason="OMNIGLOT_ZIP (path of the Omniglot zip) is not set")
def test_omniglot_zip_holds_the_published_counts():
    omniglot = read("omniglot", os.environ["OMNIGLOT_ZIP"])
    assert (omniglot.warnings, omniglot.notes) == ([], [])
    assert len(omniglot.records) == 2720
    assert omniglot.sources[""].read(omniglot.records[0].path).startswith(b"\x89PNG")


def test_a_source_may_be_any_fsspec_url(tmp_path):
    make_market(tmp_path)
    local = read("market1501", tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/", "/market", recursive=True)
    assert read("market1501", "memory://market").records == local.records
    assert read("market1501", f"file://{tmp_path}").records == local.records
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as file:
        for record in local.records:
            file.write(tmp_path / record.path, record.path)
    memory.put(str(tmp_path / "m.zip"), "/m.zip")
    zipped = read("market1501", "memory://m.zip")
    assert zipped.records == local.records
    assert zipped.sources[""].read(local.records[0].path) == (tmp_path / local.records[0].path).read_bytes()
