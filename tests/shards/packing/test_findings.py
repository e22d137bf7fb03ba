"""What only the pictures tell: the same one where it makes figures meaningless, files left out, names, pipes."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from shards.dataset_file import read_dataset_json
from shards.errors import DataError
from shards.images.listing import list_images
from shards.loading.folder_images import FolderImages
from shards.packing.build import build
from shards.packing.verify import verify
from shards.storage import read_bytes
from tests.helpers.layouts import image_bytes, make_market, make_vehicleid, write

CLEAN = [
    ("0.jpg", "a", "train", 0),
    ("1.jpg", "a", "train", 1),
    ("2.jpg", "b", "query", 0),
    ("3.jpg", "b", "gallery", 1),
]


def as_png(jpeg):
    """The same pixels in another file."""
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).save(file, "PNG")
    return file.getvalue()


def manifest(root, rows, copies=()):
    """A table of (path, identity, split, camera[, time]); copies: (path, whose, how) with the picture of another."""
    for number, row in enumerate(rows):
        write(root / row[0], image_bytes(number))
    for path, whose, convert in copies:
        write(root / path, convert((root / whose).read_bytes()))
    lines = "".join(",".join(map(str, (*row, "")[:5])) + "\n" for row in rows)
    write(root / "m.csv", "path,identity,split,camera,time\n" + lines)
    return str(root / "m.csv")


def same(jpeg):
    return jpeg


IN_GALLERY = "1 of 2 queries are in the gallery too, with no camera that keeps them apart: "


@pytest.mark.parametrize("convert", [same, as_png])
@pytest.mark.parametrize(
    ("added", "warnings"),
    [
        ([("q.jpg", "b", "query", ""), ("x.png", "b", "gallery", "")], [IN_GALLERY + "q.jpg = x.png"]),
        ([("q.jpg", "b", "query", 0), ("x.png", "b", "gallery", 1)], [IN_GALLERY + "q.jpg = x.png"]),
        ([("q.jpg", "b", "query", 2, "t1"), ("x.png", "b", "gallery", 2, "t2")], [IN_GALLERY + "q.jpg = x.png"]),
        ([("q.jpg", "b", "query", 0), ("x.png", "b", "gallery", 0)], []),
        ([("q.jpg", "a", "train", 0), ("x.png", "a", "train", 0)], []),
        (
            [("q.jpg", "a", "train", 0), ("x.png", "b", "gallery", 0)],
            [
                "1 pictures are in both train and test: q.jpg = x.png",
                "1 pictures are there under two identities: q.jpg (identity a) = x.png (identity b)",
            ],
        ),
        (
            [("q.jpg", "a", "train", 0), ("x.png", "c", "train", 0), ("4.jpg", "c", "train", 0)],
            ["1 pictures are there under two identities: q.jpg (identity a) = x.png (identity c)"],
        ),
    ],
)
def test_the_same_picture_twice_is_a_warning_and_an_error_when_strict(added, warnings, convert, tmp_path):
    rows = CLEAN + added
    table, out = manifest(tmp_path, rows, [("x.png", "q.jpg", convert)]), str(tmp_path / "out")
    if warnings:
        with pytest.raises(DataError, match=f"--strict, and there are {len(warnings)} warnings: {warnings[0][:9]}"):
            build("manifest", [table], out, processes=1, strict=True)
        with pytest.raises(DataError):
            read_dataset_json(out)
    report = build("manifest", [table], out, processes=1, strict=not warnings)
    assert report.warnings == warnings
    assert report.shards_kept == (3 if warnings else 0)
    again = build("manifest", [table], out, processes=1)
    assert (again.images_written, again.warnings, again.notes) == (0, warnings, report.notes)
    assert verify(out, decode_all=True, processes=1).problems == []
    if warnings:
        with pytest.raises(DataError, match="--strict"):
            build("manifest", [table], out, processes=1, strict=True)


def test_one_file_listed_as_query_and_in_the_gallery_is_named(tmp_path):
    rows = [*CLEAN, ("2.jpg", "b", "gallery", "")]
    table = manifest(tmp_path, rows)
    report = build("manifest", [table], str(tmp_path / "out"), processes=1)
    assert report.warnings == [IN_GALLERY.replace("of 2", "of 1") + "2.jpg = 2.jpg"]


def test_a_thousand_blank_pictures_are_compared_quickly_and_five_named(tmp_path):
    rows = [(f"{n:04}.jpg", f"i{n % 5}", ("train", "query", "gallery")[n % 3], n % 7) for n in range(600)]
    for name, *_ in rows:
        write(tmp_path / name, image_bytes(0))
    write(tmp_path / "m.csv", "path,identity,split,camera\n" + "".join(",".join(map(str, r)) + "\n" for r in rows))
    report = build("manifest", [str(tmp_path / "m.csv")], str(tmp_path / "out"), processes=1)
    assert any(line.startswith("200 of 200 queries are in the gallery") for line in report.warnings)
    assert any(line.endswith("and 195 more") for line in report.warnings)


def test_a_picture_twice_in_vehicleids_test_is_named(tmp_path):
    root = make_vehicleid(tmp_path / "v")
    report = build("vehicleid", [str(root)], str(tmp_path / "out"), processes=1)
    test = [line.split()[0] for line in (root / "train_test_split" / "test_list_2400.txt").read_text().splitlines()]
    first, other = (next(root.rglob(f"{name}.jpg")) for name in test[:2])
    other.write_bytes(first.read_bytes())
    changed = build("vehicleid", [str(root)], str(tmp_path / "other"), processes=1)
    assert any(line.startswith("1 pictures are twice in test") for line in changed.warnings)
    assert not any("twice in test" in line for line in report.warnings)


def test_a_dataset_without_findings_has_none_in_its_file(tmp_path):
    build("manifest", [manifest(tmp_path, CLEAN)], str(tmp_path / "out"), processes=1)
    assert "found" not in json.loads((tmp_path / "out" / "dataset.json").read_text())


def test_files_left_out_of_a_folder_are_counted_and_named_and_a_dangling_link_is_one(tmp_path):
    root = make_market(tmp_path / "market")
    folder = next(root.rglob("bounding_box_train"))
    for name in ("photo.heic", "clip.mp4", "Thumbs.db", "._x.jpg"):
        write(folder / name, "x")
    (folder / "notes.txt").symlink_to("/nowhere/notes.txt")
    report = build("market1501", [str(root)], str(tmp_path / "out"), processes=1)
    (line,) = [line for line in report.notes if "left out" in line]
    assert "6 files left out, no images by names and content" in line  # a readme.txt lies in each folder
    assert all(name in line for name in ("photo.heic", "clip.mp4", "notes.txt"))


def test_names_that_are_not_utf8_are_refused_before_any_work(tmp_path):
    root = make_market(tmp_path / "market")
    folder = os.fsencode(next(root.rglob("query")))
    with open(folder + b"/" + "照片.jpg".encode("gbk"), "wb") as file:
        file.write(image_bytes(0))
    with pytest.raises(DataError, match=r"1 names are not UTF-8, so no index can hold them; rename them: .*\\xd5\\xd5"):
        build("market1501", [str(root)], str(tmp_path / "out"), processes=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="not UTF-8"):
        list_images(str(root))


def test_pipes_and_devices_are_refused_and_not_waited_for(tmp_path):
    table = manifest(tmp_path, CLEAN)
    (tmp_path / "1.jpg").unlink()
    os.mkfifo(tmp_path / "1.jpg")
    (tmp_path / "3.jpg").unlink()
    (tmp_path / "3.jpg").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="1.jpg: a pipe, not a file"):
        build("manifest", [table], str(tmp_path / "out"), processes=1)
    for name, what in (("1.jpg", "a pipe"), ("3.jpg", "a device")):
        with pytest.raises(DataError, match=f"{name}: {what}, not a file"):
            FolderImages(str(tmp_path), [name], (8, 8)).read_into(np.empty((1, 3, 8, 8), np.uint8), 0, 1)
    os.mkfifo(tmp_path / "pipe.csv")
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(DataError, match="pipe.csv: a pipe, not a file"):
        build("manifest", [str(tmp_path / "pipe.csv")], str(tmp_path / "out"), processes=1)
    with pytest.raises(DataError, match="pipe.zip: a pipe, not a file"):
        list_images(str(tmp_path / "pipe.zip"))
    with pytest.raises(IsADirectoryError):
        read_bytes(str(tmp_path))
