"""verify finds every flipped byte, names shard and key, and leaves a good dataset alone."""

import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet
import pytest

from shards.errors import DataError
from shards.images.pictures import read_picture
from shards.index_table import read_index_table
from shards.loading.index import ShardIndex
from shards.packing import writer
from shards.packing.build import build
from shards.packing.verify import verify
from tests.helpers.layouts import image_bytes, make_manifest, make_vehicleid, write

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    build("manifest", [str(make_manifest(root, train=4, images=3))], str(root / "out"), processes=1)
    return root / "out"


@pytest.fixture
def copy(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    return tmp_path / "copy"


def check(folder, **settings):
    return verify(str(folder), processes=1, **settings)


def found(folder, **settings):
    """(file, key) of every problem."""
    return [(problem.file, problem.key) for problem in check(folder, **settings).problems]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x20
    path.write_bytes(data)


def test_a_good_dataset_has_no_problems_and_all_decodes_all(packed):
    sampled, whole = check(packed), check(packed, decode_all=True)
    assert sampled.problems == whole.problems == []
    assert (whole.shards, whole.images, whole.decoded) == (3, 18, 18)
    assert sampled.decoded == 3


def test_vehicleid_lists_and_long_names_verify(tmp_path):
    build("vehicleid", [str(make_vehicleid(tmp_path / "v"))], str(tmp_path / "a"), processes=1)
    assert check(tmp_path / "a", decode_all=True).problems == []
    for length in (*range(85, 106), 180):  # around the 100 characters that a plain header holds
        folder, name = tmp_path / str(length), "n" * (length - 2)
        rows = "".join(f"{name}{n}.png,x,{split}\n" for n, split in enumerate(("train", "query", "gallery")))
        write(folder / "m.csv", f"path,identity,split\n{rows}")
        for number in range(3):
            write(folder / f"{name}{number}.png", image_bytes(number, kind="PNG"))
        build("manifest", [str(folder / "m.csv")], str(folder / "out"), processes=1)
        assert check(folder / "out", decode_all=True).problems == []


def test_every_flipped_byte_is_found_and_named_where_it_belongs_to_a_record(copy):
    shard = copy / "train-000000.tar"
    good = shard.read_bytes()
    owner = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key = member.name.rsplit(".", 1)[0]
            owner |= dict.fromkeys(range(member.offset, member.offset_data + member.size), key)
            end = member.offset_data + member.size
            if member.name.endswith(".json"):  # its last words, `.jpg"}`: the ending is in no index
                owner |= dict.fromkeys(range(end - 6, end), "")
    positions = random.Random(0).sample(range(len(good)), 250)
    for position in positions:
        flip(shard, position)
        problems = check(copy).problems
        assert problems, position
        assert {problem.file for problem in problems} == {shard.name}
        if owner.get(position):  # the rest is of no record: zeros between them
            assert owner[position] in {problem.key for problem in problems}, position
        shard.write_bytes(good)
    assert len({owner.get(position) for position in positions}) > 10


def test_one_bad_record_does_not_hide_the_next(copy):
    rows = [r for r in read_index_table(str(copy)).to_pylist() if r["shard"] == "train-000000.tar"]
    for row in rows[2:5]:
        flip(copy / row["shard"], row["offset"] + row["size"] // 2)
    flip(copy / "train-000000.tar", rows[7]["offset"] - 500)  # its header
    assert found(copy) == [("train-000000.tar", rows[n]["key"]) for n in (2, 3, 4, 7)]


def test_a_shard_cut_short_names_every_image_that_is_gone(copy):
    rows = [r for r in read_index_table(str(copy)).to_pylist() if r["shard"] == "train-000000.tar"]
    shard = copy / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[: rows[8]["offset"] + 10])
    problems = check(copy).problems
    assert [(p.key, p.what) for p in problems] == [
        (row["key"], "the shard ends before the end of this image") for row in rows[8:]
    ]


def test_missing_extra_and_longer_shards_are_named(copy):
    (copy / "query-000000.tar").unlink()
    shutil.copy(copy / "train-000000.tar", copy / "train-000001.tar")
    with (copy / "gallery-000000.tar").open("ab") as file:
        file.write(bytes(512))
    assert sorted(found(copy)) == [("gallery-000000.tar", ""), ("query-000000.tar", ""), ("train-000001.tar", "")]


def without_checksums(folder, **changes):
    """What another program may have written: dataset.json tells neither its own checksum nor those of the files."""
    dataset = json.loads((folder / "dataset.json").read_text())
    del dataset["crc32"], dataset["files"]
    (folder / "dataset.json").write_text(json.dumps(dataset | changes))


def test_an_index_that_does_not_fit_dataset_json_and_the_shards_is_named(copy):
    table = read_index_table(str(copy))
    rows = table.to_pylist()
    rows[0]["camera"] = int(rows[0]["camera"] == 0)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), copy / "index.parquet")
    (problem,) = check(copy).problems
    assert problem.file == "index.parquet" and "not the file that dataset.json" in problem.what
    without_checksums(copy)
    problems = check(copy).problems
    assert [p.file for p in problems] == ["index.parquet", "train-000000.tar"]
    assert problems[1].key == rows[0]["key"] and "its JSON differs from the index in camera" in problems[1].what
    rows[0]["identity"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), copy / "index.parquet")
    (problem,) = check(copy).problems
    assert "column identity has empty cells" in problem.what


def test_counts_in_dataset_json_are_checked(copy):
    splits = json.loads((copy / "dataset.json").read_text())["splits"]
    splits["query"]["images"] += 1
    without_checksums(copy, splits=splits)
    (problem,) = check(copy).problems
    assert problem.file == "index.parquet" and "lists 18 images, dataset.json says" in problem.what
    splits["gallery"]["images"] -= 1
    facts = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(facts | {"splits": splits}))
    assert [problem.what[:17] for problem in check(copy).problems] == ["split query holds", "split gallery hol"]


@pytest.mark.parametrize("name", ["dataset.json", "index.parquet"])
def test_every_flipped_bit_of_the_facts_and_the_index_is_a_problem_and_never_a_traceback(copy, name):
    good = (copy / name).read_bytes()
    draws = random.Random(0)
    for position in draws.sample(range(len(good)), 200):
        data = bytearray(good)
        data[position] ^= 1 << draws.randrange(8)
        (copy / name).write_bytes(data)
        try:
            problems = check(copy).problems
        except DataError as error:  # another format, so it seems
            assert "format_version" in str(error)
            continue
        assert problems and problems[0].file == name, position
        try:
            ShardIndex.open(str(copy), str(copy.parent / "cache"))
        except DataError as error:
            assert name in str(error) and "\n" not in str(error)
        else:  # the name of the checksum is hit, so no reader looks at it
            assert problems[0].what.startswith("unknown key")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"splits": []}, "splits is [], not of type dict"),
        ({"splits": {"train": {"images": "3"}}}, "splits.train does not say how many images"),
        ({"cameras": "two"}, "cameras is 'two', not of type int"),
    ],
)
def test_wrong_types_in_dataset_json_are_named(copy, changes, fault):
    without_checksums(copy, **changes)
    (problem,) = check(copy).problems
    assert fault in problem.what
    with pytest.raises(DataError, match=re.escape(fault)):
        ShardIndex.open(str(copy), str(copy.parent / "cache"))


def test_an_image_that_cannot_be_decoded_is_found_by_all(tmp_path, monkeypatch):
    """build refuses such an image; shards of earlier versions may hold one."""
    manifest = make_manifest(tmp_path, train=4, images=3)
    damaged = bytearray(image_bytes(1001))
    table_start = damaged.index(b"\xff\xc4") + 5
    damaged[table_start : table_start + 16] = b"\xff" * 16  # no Huffman table; header and end are as they should be
    write(tmp_path / "crops" / "0001" / "01.jpg", bytes(damaged))
    whole = read_picture(image_bytes(1001))
    monkeypatch.setattr(writer, "read_picture", lambda data: whole)
    build("manifest", [str(manifest)], str(tmp_path / "out"), processes=1)
    assert found(tmp_path / "out") == []
    (problem,) = check(tmp_path / "out", decode_all=True).problems
    assert problem.key == "crops_0001_01" and "cannot be decoded" in problem.what


def test_two_processes_find_the_same_in_the_same_order(copy):
    for shard in copy.glob("*.tar"):
        flip(shard, 600)
    one = check(copy).problems
    assert len(one) == 3
    assert verify(str(copy), processes=2).problems == one


def test_what_is_no_dataset_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no packed dataset"):
        check(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format_version": 99}')
    with pytest.raises(DataError, match="format_version is 99, this program reads 1"):
        check(tmp_path)


def test_the_command_ends_with_1_and_a_line_for_each_problem(copy):
    line = [sys.executable, str(ROOT / "launch" / "pack.py"), "verify", str(copy), "--all"]
    good = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (good.returncode, good.stderr) == (0, "") and "all good; 3 shards, 18 images, 18 of them" in good.stdout
    row = read_index_table(str(copy)).to_pylist()[4]
    flip(copy / row["shard"], row["offset"] + 5)
    bad = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert bad.returncode == 1
    assert f"bad: {row['shard']}: {row['key']}: the image's bytes do not give the checksum" in bad.stdout
