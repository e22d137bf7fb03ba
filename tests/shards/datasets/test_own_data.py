"""Own data as it lies: folders of identities, sequences with tracks, names, and what is shown before it is done."""

import io
from collections import Counter

import numpy as np
import pytest
import yaml
from PIL import Image

from launch import pack
from shards.dataset_file import read_dataset_json
from shards.datasets.joint import read_collection
from shards.datasets.layout import image_files
from shards.errors import DataError
from shards.loading.index import ShardIndex
from shards.loading.tar_images import TarImages
from shards.packing.build import build
from shards.packing.verify import verify
from shards.storage import Source
from tests.helpers.layouts import image_bytes, make_market, tree_bytes, write
from tests.shards.datasets.test_datasets import fails, read, rows

SPLITS = ("train", "query", "gallery")
PICTURE, PICTURE_PNG = image_bytes(width=8, height=8), image_bytes(width=8, height=8, kind="PNG")
PEOPLE = [f"person {number}" for number in range(10)]


def make_folders(root, identities=PEOPLE, cameras=2, images=3):
    for identity in identities:
        for camera in range(1, cameras + 1):
            for number in range(images):
                write(root / identity / f"cam{camera:02d}" / f"{number}.jpg", PICTURE)
    return root


def splits(collection):
    """{split: identities}, and {split: images}."""
    found = {
        split: {r.identity for r in collection.records if r.split == split} for split in ("train", "query", "gallery")
    }
    return found, Counter(r.split for r in collection.records)


def test_identities_in_folders_are_divided_and_one_image_a_camera_is_a_query(tmp_path):
    mine = read("folders", make_folders(tmp_path), camera_pattern=r"cam(\d+)/")
    found, images = splits(mine)
    assert len(found["train"]) == 7 and found["query"] == found["gallery"] and len(found["query"]) == 3
    assert not found["train"] & found["query"] and found["train"] | found["query"] == set(PEOPLE)
    assert images == {"train": 42, "query": 6, "gallery": 12}
    queries = Counter((r.identity, r.camera) for r in mine.records if r.split == "query")
    assert set(queries.values()) == {1} and {camera for _, camera in queries} == {0, 1}
    assert (mine.cameras, mine.views, mine.noun, mine.name) == (2, 0, "object", tmp_path.name)
    assert {r.camera for r in mine.records if "cam01" in r.path} == {0}


def test_the_division_follows_from_seed_and_names_alone(tmp_path):
    def of(root, **options):
        return {r.path: r.split for r in read("folders", root, **options).records}

    first = of(make_folders(tmp_path / "a"))
    assert of(make_folders(tmp_path / "b", PEOPLE[::-1])) == first
    assert of(tmp_path / "a", seed=1) != first
    more = of(make_folders(tmp_path / "b", ["another"]))
    changed = {path.split("/")[0] for path in first if first[path] != more[path]}
    assert len(changed) <= 1  # the share of 11 identities is 3 still: at most one changes places with the new one
    assert {*of(tmp_path / "a", test_share=0.0).values()} == {"train"}
    assert (
        len({path.split("/")[0] for path, split in of(tmp_path / "a", test_share=0.5).items() if split == "train"}) == 5
    )


def test_an_identity_keeps_an_image_in_the_gallery_and_without_cameras_has_one_query(tmp_path):
    make_folders(tmp_path, cameras=2, images=1)
    with_cameras = read("folders", tmp_path, camera_pattern=r"cam(\d+)")
    assert splits(with_cameras)[1] == {"train": 14, "query": 3, "gallery": 3}
    assert splits(read("folders", tmp_path))[1] == {"train": 14, "query": 3, "gallery": 3}
    single = make_folders(tmp_path / "single", cameras=1, images=1)
    assert splits(read("folders", single))[1] == {"train": 7, "gallery": 3}


def test_folders_that_are_divided_stay_so(tmp_path):
    for split, people in (("train", PEOPLE[:3]), ("query", PEOPLE[3:5]), ("gallery", PEOPLE[3:6])):
        make_folders(tmp_path / split, people)
    mine = read("folders", tmp_path)
    assert splits(mine)[0] == {"train": {*PEOPLE[:3]}, "query": {*PEOPLE[3:5]}, "gallery": {*PEOPLE[3:6]}}
    assert not any("share" in note for note in mine.notes)
    make_folders(tmp_path / "val", PEOPLE[:1])
    fails(
        "val beside gallery, query, train: the folders of a divided root are train, query and gallery",
        "folders",
        tmp_path,
    )


def test_a_camera_is_guessed_shown_and_taken_when_it_is_confirmed(tmp_path):
    make_folders(tmp_path)
    shown = read("folders", tmp_path)
    assert shown.cameras == 0 and {r.camera for r in shown.records} == {-1}
    assert any("look as if they named 2 cameras (1, 2), which are taken as unknown: confirm" in n for n in shown.notes)
    taken = read("folders", tmp_path, camera_pattern="guess")
    assert taken.cameras == 2 and any("is the guess that is used" in note for note in taken.notes)
    plain = tmp_path / "plain"
    for person in PEOPLE:
        write(plain / person / "holiday.jpg", PICTURE)
    assert not any("cameras" in note for note in read("folders", plain).notes)
    fails("--camera-pattern guess: no names look as if they named cameras", "folders", plain, camera_pattern="guess")


@pytest.mark.parametrize(
    ("name", "camera"),
    [("0002_c1s1_000451_03.jpg", "1"), ("a/c003_12.png", "3"), ("cam-2/x.jpg", "2"), ("front_Camera12.jpg", "12")],
)
def test_names_as_cameras_have_them_are_guessed(name, camera, tmp_path):
    other = name.replace(camera, "4")
    for person in PEOPLE:
        write(tmp_path / person / name, PICTURE)
        write(tmp_path / person / other, PICTURE)
    cameras = sorted({camera, "4"}, key=int)
    note = next(note for note in read("folders", tmp_path, camera_pattern="guess").notes if "cameras: " in note)
    assert note == "folders: cameras: " + ", ".join(f"{name} is {number}" for number, name in enumerate(cameras))


def test_a_pattern_that_finds_some_cameras_only_leaves_the_others_unknown(tmp_path):
    make_folders(tmp_path)
    write(tmp_path / PEOPLE[0] / "passport.jpg", PICTURE)
    mine = read("folders", tmp_path, camera_pattern=r"cam(\d+)")
    assert any("finds no camera in 1 of 61 names: these are unknown" in line for line in mine.warnings)
    assert [r.camera for r in mine.records if "passport" in r.path] == [-1]


def test_mistakes_with_folders_are_one_line_each(tmp_path):
    make_folders(tmp_path / "one", PEOPLE[:2])
    fails(r"--test-share 0.3 of 2 identities is 1: at least 2 are needed", "folders", tmp_path / "one")
    fails(r"pattern 'cam\(' is no regular expression", "folders", tmp_path / "one", camera_pattern="cam(")
    fails(r"'cam\\\\d\+' has no group: put brackets around", "folders", tmp_path / "one", camera_pattern=r"cam\d+")
    write(tmp_path / "one" / "loose.jpg", PICTURE)
    fails(
        "1 images lie in no identity's folder: loose.jpg; the layout is ROOT/IDENTITY/image",
        "folders",
        tmp_path / "one",
    )
    (tmp_path / "empty").mkdir()
    fails("holds no images", "folders", tmp_path / "empty")


def test_images_are_known_by_their_content_whatever_they_are_called(tmp_path):
    make_folders(tmp_path, PEOPLE)
    write(tmp_path / PEOPLE[0] / "7f3a21", PICTURE)
    write(tmp_path / PEOPLE[0] / "scan.dat", PICTURE_PNG)
    write(tmp_path / PEOPLE[0] / "notes.txt", b"BM is how it begins")
    source = Source(tmp_path)
    found = image_files(source, PEOPLE[0])
    assert f"{PEOPLE[0]}/7f3a21" in found and f"{PEOPLE[0]}/scan.dat" in found
    assert source.left_out == {f"{PEOPLE[0]}/notes.txt"}
    build("folders", [str(tmp_path)], str(tmp_path.parent / "packed"), processes=1)
    assert not verify(str(tmp_path.parent / "packed"), decode_all=True, processes=1).problems


def test_a_dry_run_shows_and_explains_what_would_be_packed_and_writes_nothing(tmp_path, capsys):
    make_folders(tmp_path / "photos")
    before = tree_bytes(tmp_path)
    line = ["build", "--dataset", "folders", "--root", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    assert not pack.main([*line, "--dry-run", "--noun", "person", "--camera-pattern", "guess", "--test-share", "0.2"])
    told = capsys.readouterr().out
    assert tree_bytes(tmp_path) == before
    assert "photos (person)" in told and "nothing was written" in told
    for split, images, identities in (("train", 48, 8), ("query", 4, 2), ("gallery", 8, 2)):
        row = next(row for row in told.splitlines() if row.startswith(f"│ {split} "))
        assert [int(cell) for cell in row.split("│")[2:5]] == [images, identities, 2]
    note = next(line for line in told.splitlines() if "a share of 0.2 of the identities" in line)
    assert note.count(". ") == 2 and note.endswith("stays in the gallery.")
    with pytest.raises(SystemExit):
        pack.main([*line, "--test-share", "1.5"])
    assert "'1.5' is not a share from 0 to below 1" in capsys.readouterr().err


# ---- names


def test_a_dataset_is_called_as_it_is_told_or_as_its_folder_is(tmp_path):
    photos = make_folders(tmp_path / "photos")
    for name, called in ((None, "photos"), ("staff", "staff")):
        out = tmp_path / f"{called}-shards"
        build("folders", [str(photos)], str(out), name=name, processes=1)
        assert ShardIndex.open(str(out)).name == called
    table = tmp_path / "mine" / "list.csv"
    write(table, b"path,identity,split\na.jpg,x,train\n")
    assert read("manifest", table).name == "mine"
    market = make_market(tmp_path / "Market-1501-v15.09.15")
    assert read_collection("market1501", [str(market)]).name == "market1501"
    assert read_collection("market1501", [str(market)], name="shop").name == "shop"
    assert read_collection("market1501+folders", [str(market), str(photos)]).name == "market1501+folders"
    with pytest.raises(DataError, match="--name: ' ' is no name for a dataset"):
        read_collection("market1501", [str(market)], name=" ")


def test_a_packed_dataset_keeps_its_name_when_it_is_packed_again(tmp_path):
    photos, out = make_folders(tmp_path / "photos"), str(tmp_path / "out")
    first = build("folders", [str(photos)], out, processes=1)
    again = build("folders", [str(photos)], out, name="staff", processes=1)
    assert again.images_written == 0 and again.dataset == first.dataset
    assert any("it is called photos there, and stays so" in note for note in again.notes)


# ---- the page of a packed dataset


def test_the_page_lists_the_shards_of_each_split_for_other_libraries(tmp_path):
    out = tmp_path / "out"
    build("folders", [str(make_folders(tmp_path / "photos"))], str(out), processes=1)
    text = (out / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    (config,) = head["configs"]
    assert config["config_name"] == "default"
    splits = read_dataset_json(str(out))["splits"]
    assert [part["split"] for part in config["data_files"]] == list(splits) == ["train", "query", "gallery"]
    for part in config["data_files"]:
        assert len(list(out.glob(part["path"]))) == splits[part["split"]]["shards"]
    assert "| query | 3 | 3 | 1 |" in text and "# photos" in text
    (out / "README.md").write_text(text + "\nMade by us.\n")
    assert not verify(str(out), processes=1).problems


# ---- MOTChallenge


def frame(number):
    """100 x 60 pixels; the colour of each says where it is, and its blue the frame."""
    y, x = np.mgrid[0:60, 0:100]
    pixels = np.stack([x * 2, y * 4, np.full_like(x, number)], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


LINES = [
    *(f"{n},{track},{10 * track},5,20,30,1,1,0.9" for track in (1, 2, 3, 4) for n in range(track, 13)),
    "1,8,0,0,20,30,0,1,1",  # to be ignored
    "1,9,0,0,20,30,1,3,1",  # a vehicle
    "2,5,-4.5,40,10,40,1,1,0.2",  # partly outside
]


def make_mot(root, sequences=("MOT17-02", "MOT17-04")):
    for name in sequences:
        for number in range(1, 13):
            write(root / name / "img1" / f"{number:06d}.png", frame(number))
        write(root / name / "gt" / "gt.txt", "\n".join(LINES).encode())
        write(root / name / "seqinfo.ini", b"[Sequence]")
    return root


def test_tracks_become_identities_and_boxes_images(tmp_path):
    mot = read("mot", make_mot(tmp_path / "train"), frame_step=5)
    assert (mot.noun, mot.cameras, mot.name) == ("person", 2, "train")
    assert {r.identity for r in mot.records} == {
        f"{name}-{t}" for name in ("MOT17-02", "MOT17-04") for t in range(1, 6)
    }
    times = {r.identity: [] for r in mot.records}
    for record in mot.records:
        times[record.identity].append(int(record.time))
        assert record.camera == ("MOT17-04" in record.path)
    assert times["MOT17-02-1"] == [1, 6, 11] and times["MOT17-04-4"] == [4, 9] and times["MOT17-02-5"] == [2]
    assert any("every track is in one sequence" in line and "eval.rule=none" in line for line in mot.warnings)
    shared = read("mot", tmp_path / "train", shared_tracks=True)
    assert {r.identity for r in shared.records} == set("12345") and not shared.warnings
    alone = read("mot", make_mot(tmp_path / "one", ["seq"]) / "seq", test_share=0.5)
    assert alone.cameras == 1 and alone.records[0].path.startswith("img1/000001-1")


def test_crops_are_packed_with_the_pixels_of_their_boxes(tmp_path):
    out = tmp_path / "out"
    report = build("mot", [str(make_mot(tmp_path / "mot"))], str(out), options={"frame_step": 5}, processes=1)
    assert not verify(str(out), decode_all=True, processes=1).problems
    assert any("cut out of a picture by their boxes" in note for note in report.notes)
    index = ShardIndex.open(str(out))
    for split in index.split_names:
        rows_of = index.split(split)
        for row in range(len(rows_of)):
            left = 10 * int(rows_of.identity[row].rsplit("-", 1)[1])
            pixels = np.empty((1, 3, 30, 20), np.uint8)
            TarImages(index, split, (30, 20)).read_into(pixels, row, row + 1)
            if left == 50:  # the one that is partly outside: 40 rows of its lower 20, 6 of its 10 columns
                continue
            assert pixels[0, :, 0, 0].tolist() == [2 * left, 20, int(rows_of.times[row])]
            assert pixels[0, :, -1, -1].tolist() == [2 * (left + 19), 4 * 34, int(rows_of.times[row])]
    again = build("mot", [str(tmp_path / "mot")], str(out), options={"frame_step": 5}, processes=1)
    assert again.images_written == 0


def test_a_trackers_files_are_read_in_place_of_the_truth(tmp_path):
    make_mot(tmp_path / "mot")
    for name in ("MOT17-02", "MOT17-04"):
        lines = [f"{n} {track} 3.5 2 20 30 0.8 -1 -1 -1" for track in (7, 8, 9, 10) for n in (1, 2)]
        write(tmp_path / "tracks" / f"{name}.txt", "\n".join(lines).encode())
    found = read("mot", tmp_path / "mot", tracks=str(tmp_path / "tracks"), frame_step=1)
    assert {r.identity.rsplit("-", 1)[1] for r in found.records} == {"7", "8", "9", "10"}
    assert found.records[0].crop.box == (3, 2, 24, 32) and len(found.records) == 16
    write(tmp_path / "tracks" / "MOT17-04.txt", b"1,2,three")
    fails(
        r"MOT17-04.txt, line 1: '1,2,three' is not frame,track",
        "mot",
        tmp_path / "mot",
        tracks=str(tmp_path / "tracks"),
    )
    write(tmp_path / "tracks" / "MOT17-04.txt", b"99,2,3,4,5,6,1")
    fails("frame 99 is not in MOT17-04/img1/", "mot", tmp_path / "mot", tracks=str(tmp_path / "tracks"))
    fails("holds no sequence, which is a folder with frames in img1/", "mot", tmp_path / "tracks")


# ---- more of the published datasets


@pytest.mark.parametrize("place", ["distractors_500k", "Market-1501-v15.09.15/distractors_500k", "distractors"])
def test_market1501_takes_the_500k_distractors_where_they_lie(place, tmp_path):
    make_market(tmp_path / "Market-1501-v15.09.15")
    before = rows(read("market1501", tmp_path), "gallery")
    for name in ("0000_c3s1_000451_03.jpg", "123456.jpg"):
        write(tmp_path / place / name, PICTURE)
    market = read("market1501", tmp_path)
    new = [("0000_c3s1_000451_03.jpg", "0000", 2), ("123456.jpg", "0000", -1)]
    assert sorted([*before, *new]) == rows(market, "gallery")
    assert any(f"2 distractors of {place}/ are in the gallery, as identity 0000" in note for note in market.notes)


@pytest.mark.parametrize(("boxes", "folder"), [("detected", "detected"), ("labelled", "labeled")])
def test_cuhk03_is_read_in_its_new_protocol_with_either_boxes(boxes, folder, tmp_path):
    names = {
        "bounding_box_train": ["0003_c1_1.png", "0003_c2_6.png", "0004_c1_2.png"],
        "query": ["0006_c1_21.png", "0006_c2_23.png"],
        "bounding_box_test": ["0006_c1_22.png", "0006_c2_25.png"],
    }
    for split, images in names.items():
        for name in images:
            write(tmp_path / "cuhk03-np" / folder / split / name, PICTURE_PNG)
    cuhk = read("cuhk03", tmp_path, boxes=boxes)
    assert (cuhk.noun, cuhk.cameras) == ("person", 2)
    assert rows(cuhk, "query") == [("0006_c1_21.png", "0006", 0), ("0006_c2_23.png", "0006", 1)]
    published = "7,368/767" if boxes == "labelled" else "7,365/767"
    assert any(f"train 3/2 (published {published})" in note for note in cuhk.notes)
    other = "labelled" if boxes == "detected" else "detected"
    with pytest.raises(DataError, match="not the expected layout; missing"):
        read("cuhk03", tmp_path, boxes=other)
