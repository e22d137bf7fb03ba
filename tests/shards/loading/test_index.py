"""The shard index: what it says, how fast it opens, and how a damaged dataset is refused."""

import json
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.errors import DataError
from shards.format import index_schema
from shards.loading.index import ShardIndex
from tests.helpers.shards import write_index, write_shards

SPLITS = {
    "train": {"b": 4, "a": [0, -1, 2], "c": 3},
    "query": {"x": 2},
    "gallery": {"x": 3, "y": 2, "0000": 1},
}


@pytest.fixture
def tiny(tmp_path):
    return Path(write_shards(tmp_path / "tiny", SPLITS, images_per_shard=5))


def opened(folder):
    return ShardIndex.open(str(folder), str(folder.parent / "cache"))


def test_the_index_says_what_was_packed(tiny):
    index = opened(tiny)
    assert (index.name, index.noun, index.cameras, index.views) == ("tiny", "thing", 3, 2)
    assert index.identities == ["0000", "a", "b", "c", "x", "y"]
    train = index.split("train")
    assert (train.name, len(train), train.num_identities) == ("train", 10, 3)
    assert train.label_names == ["a", "b", "c"]
    assert train.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 3
    assert train.identity.tolist() == ["a"] * 3 + ["b"] * 4 + ["c"] * 3
    assert train.cameras[:3].tolist() == [0, -1, 2]
    assert [train.shard_names[shard] for shard in train.shard] == ["train-000000.tar"] * 7 + ["train-000001.tar"] * 3
    assert (train.keys[0], train.key(9), train.times[0], train.lists[0]) == ("a_00000", "c_00009", "", "")
    types = {name: getattr(train, name).dtype for name in ("shard", "labels", "offsets", "sizes", "crc32", "views")}
    assert types == dict.fromkeys(types, np.int64) | {"shard": np.int32, "crc32": np.uint32}
    for row in range(len(train)):
        shard = (tiny / train.shard_names[train.shard[row]]).read_bytes()
        image = shard[train.offsets[row] : train.offsets[row] + train.sizes[row]]
        assert zlib.crc32(image) == train.crc32[row]


def test_identity_codes_are_shared_by_all_splits(tiny):
    index = opened(tiny)
    query, gallery = index.split("query"), index.split("gallery")
    assert query.labels.tolist() == [-1, -1]
    assert query.label_names == []
    codes = dict(zip(gallery.identity, gallery.identity_codes, strict=True))
    assert set(query.identity_codes.tolist()) == {codes["x"]}
    assert [index.identities[code] for code in gallery.identity_codes] == gallery.identity.tolist()


def test_unknown_identities_have_no_code(tmp_path):
    write_shards(tmp_path / "set", {"query": {"": 2, "x": 1}, "gallery": {"-1": 2, "x": 2}})
    index = opened(tmp_path / "set")
    assert index.split("query").identity_codes.tolist() == [-1, -1, index.identities.index("x")]
    assert index.split("gallery").identity_codes.tolist() == [-1, -1] + [index.identities.index("x")] * 2
    assert index.split("query").num_identities == 1


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tiny):
    with pytest.raises(DataError, match=r"no split 'test'; it has: gallery, query, train"):
        opened(tiny).split("test")


def test_a_split_reaches_another_process_as_an_address(tiny):
    split = opened(tiny).split("gallery")
    data = pickle.dumps(split)
    assert len(data) < 500
    np.testing.assert_array_equal(pickle.loads(data).crc32, split.crc32)


def test_a_dataset_packed_anew_while_in_use_is_noticed(tiny):
    data = pickle.dumps(opened(tiny).split("train"))
    write_shards(tiny, {"train": {"b": 4, "a": 2}})
    with pytest.raises(DataError, match="packed anew while it was in use"):
        pickle.loads(data)


def test_rows_of_a_split_need_not_be_neighbours(tiny):
    table = pq.read_table(tiny / "index.parquet")
    order = np.argsort(np.arange(len(table)) % 3, kind="stable")
    pq.write_table(table.take(order), tiny / "index.parquet")
    change_facts(tiny, files={})
    train = opened(tiny).split("train")
    expected = [
        key for key, split in zip(*table.take(order).select(["key", "split"]), strict=True) if split.as_py() == "train"
    ]
    assert train.keys.tolist() == [key.as_py() for key in expected]


def large_table(num_images=221_763, num_identities=26_267):
    """An index of VehicleID's size."""
    identity = np.sort(np.random.default_rng(0).integers(0, num_identities, num_images))
    train = num_images // 2
    size = np.random.default_rng(1).integers(5_000, 40_000, num_images)
    shard = np.arange(num_images) // 8000
    labels = np.unique(identity[:train], return_inverse=True)[1]
    columns = {
        "split": ["train"] * train + ["test"] * (num_images - train),
        "shard": [f"{'train' if row < train else 'test'}-{number:06d}.tar" for row, number in enumerate(shard)],
        "key": [f"image_{row:07d}" for row in range(num_images)],
        "offset": np.cumsum(size) - size,
        "size": size,
        "crc32": size.astype(np.uint32),
        "identity": [f"{number:05d}" for number in identity],
        "label": np.concatenate([labels, np.full(num_images - train, -1)]),
        "camera": np.full(num_images, -1),
        "view": np.full(num_images, -1),
        "time": [""] * num_images,
        "lists": [""] * train + ["800,1600,2400"] * (num_images - train),
        "width": np.full(num_images, 300),
        "height": np.full(num_images, 300),
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in index_schema()})


def test_an_index_of_vehicleid_opens_in_half_a_second_and_is_mapped_the_second_time(tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    table = large_table()
    counts = {"train": {"images": 110_881, "identities": 1, "shards": 1}}
    counts["test"] = {"images": 221_763 - 110_881, "identities": 1, "shards": 1}
    write_index(folder, [], counts, table=table)
    for name in set(table.column("shard").to_pylist()):
        with open(folder / name, "wb") as file:
            file.truncate(1 << 40)
    taken = []
    for _ in range(4):
        start = time.process_time()
        index = opened(folder)
        train = index.split("train")
        assert len(train.labels) == len(train.identity_codes) == 110_881
        taken.append(time.process_time() - start)
    assert taken[0] < 0.5
    assert min(taken[1:]) < 0.1
    assert not train.labels.flags.owndata
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 1


@pytest.mark.parametrize(
    "write", [{}, {"use_dictionary": False}, {"row_group_size": 3}, {"dictionary_pagesize_limit": 1}]
)
def test_an_index_says_the_same_however_parquet_stores_it(tiny, write):
    expected = all_columns(opened(tiny))
    table = pq.read_table(tiny / "index.parquet")
    pq.write_table(table, tiny / "index.parquet", **write)
    change_facts(tiny, files={})
    assert all_columns(opened(tiny)) == expected
    wider = table.column("identity").combine_chunks().dictionary_encode()
    more = pa.DictionaryArray.from_arrays(wider.indices, pa.concat_arrays([wider.dictionary, pa.array(["nobody"])]))
    place = table.column_names.index("identity")
    pq.write_table(table.set_column(place, "identity", more), tiny / "index.parquet", **write)
    assert all_columns(opened(tiny)) == expected


def test_a_process_holds_no_object_for_each_image_or_identity(tmp_path):
    """Opened and asked for all numbers and names: what is not in the file's map does not grow with the images."""
    train = ShardIndex.open(wide_index(tmp_path / "wide", 60_000), str(tmp_path / "cache")).split("train")
    tracemalloc.start()
    try:
        index = ShardIndex.open(train.index.url, str(tmp_path / "cache"))
        train = index.split("train")
        held = [train.labels, train.identity_codes, train.shard, train.cameras, train.sizes, train.label_names]
        assert (train.label_names[59_999], train.key(59_999), len(held)) == ("059999", "k59999", 6)
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert size < 20 * len(train), size / len(train)


def wide_index(folder, num_images):
    """Every image of its own identity."""
    folder.mkdir()
    (folder / "train-000000.tar").touch()
    number = np.arange(num_images)
    columns = {name: np.zeros(num_images, np.int64) for name in index_schema().names}
    columns |= {"identity": [f"{n:06d}" for n in number], "key": [f"k{n}" for n in number], "label": number}
    columns |= dict.fromkeys(("time", "lists"), [""] * num_images)
    columns |= {"split": ["train"] * num_images, "shard": ["train-000000.tar"] * num_images}
    table = pa.table({field.name: pa.array(columns[field.name], field.type) for field in index_schema()})
    counts = {"train": {"images": num_images, "identities": num_images, "shards": 1}}
    return write_index(folder, [], counts, table=table)


def test_one_process_of_a_node_makes_the_copy_and_the_others_wait_for_it(tmp_path):
    url = wide_index(tmp_path / "wide", 200_000)
    code = (
        "import sys, shards.loading.index_file as made; from shards.loading.index import ShardIndex\n"
        "write = made.IndexFile._write\n"
        "made.IndexFile._write = lambda self, file: (print('made', flush=True), write(self, file))\n"
        f"print(len(ShardIndex.open({url!r}, {str(tmp_path / 'cache')!r}).split('train').labels))"
    )
    call = [sys.executable, "-c", code]
    started = [subprocess.Popen(call, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate()[0].split() for process in started]
    assert [words[-1] for words in said] == ["200000"] * 4
    assert sum(words.count("made") for words in said) == 1


def test_copies_of_the_index_that_nobody_opens_any_more_are_removed(tiny):
    opened(tiny)
    folder = tiny.parent / "cache" / "index"
    (used,) = folder.iterdir()
    unused = folder / "unused.arrow"
    for path in (used, unused):
        path.touch()
        os.utime(path, (0, 0))
    opened(tiny)  # marks its own copy as used
    change_facts(tiny, note="packed anew")
    opened(tiny)
    assert used.exists() and not unused.exists()


def all_columns(index):
    """Everything that an index says of every image."""
    names = ("shard", "labels", "cameras", "views", "offsets", "sizes", "crc32", "identity_codes")
    strings = ("keys", "identity", "times", "lists", "identities", "shard_names", "label_names")
    splits = [index.split(name) for name in index.split_names]
    return [[list(getattr(split, name)) for split in splits] for name in (*names, *strings)]


def test_a_damaged_copy_of_the_index_is_made_anew(tiny):
    """Wherever a bit is another one: no column says anything else, and the copy is whole again."""
    expected = all_columns(opened(tiny))
    (path,) = (tiny.parent / "cache" / "index").iterdir()
    good = path.read_bytes()
    for damaged in (b"", good[:3], good[:-9], good[9:], *(_flipped(good, place) for place in range(0, len(good), 29))):
        path.write_bytes(damaged)
        assert all_columns(opened(tiny)) == expected
        assert path.read_bytes() == good


@pytest.mark.parametrize("column", ["labels", "keys", "identities"])
def test_what_is_damaged_after_the_index_was_opened_is_found_when_it_is_first_used(tiny, column):
    """Opening reads no column, so that it costs the same however many rows there are."""
    expected = list(getattr(opened(tiny).split("train"), column))
    (path,) = (tiny.parent / "cache" / "index").iterdir()
    good = path.read_bytes()
    index = opened(tiny)
    path.write_bytes(bytes(byte ^ 1 for byte in good[:-2000]) + good[-2000:])
    assert list(getattr(index.split("train"), column)) == expected
    assert path.read_bytes() == good


def test_the_copy_of_another_index_under_this_name_is_not_taken(tiny):
    opened(tiny)
    (path,) = (tiny.parent / "cache" / "index").iterdir()
    good = path.read_bytes()
    other = Path(write_shards(tiny.parent / "other", {"train": {"b": 1, "a": 1}, **{n: {"x": 1} for n in SPLITS}}))
    ShardIndex.open(str(other), str(tiny.parent / "another-cache"))
    (theirs,) = (tiny.parent / "another-cache" / "index").iterdir()
    path.write_bytes(theirs.read_bytes())
    assert opened(tiny).split("train").label_names == ["a", "b", "c"]
    assert path.read_bytes() == good


def _flipped(data, place):
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def test_opening_and_planning_need_no_heavy_library(tiny):
    code = (
        "import sys, shards.loading.pk_sampler; from shards.loading.index import ShardIndex\n"
        f"ShardIndex.open({str(tiny)!r}, {str(tiny.parent / 'cache')!r}).split('train')\n"
        "print([name for name in ('torch', 'pandas', 'webdataset', 'PIL') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def change_facts(folder, **changes):
    facts = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(facts | changes))


def drop_column(path, name):
    pq.write_table(pq.read_table(path).drop([name]), path)


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), ["dataset.json: no such file", "pack.py build"]),
        (lambda folder: cut(folder / "dataset.json", 30), ["dataset.json: not JSON", "re-pack"]),
        (lambda folder: change_facts(folder, format_version=9), ["format_version is 9", "reads 1", "pack"]),
        (lambda folder: (folder / "index.parquet").unlink(), ["index.parquet: no such file", "re-pack"]),
        (lambda folder: cut(folder / "index.parquet", 700), ["index.parquet: not the file", "cut short", "copy both"]),
        (
            lambda folder: (change_facts(folder, files={}), cut(folder / "index.parquet", 700)),
            ["index.parquet: damaged", "re-pack"],
        ),
        (
            lambda folder: change_facts(folder, files={"index.parquet": {"bytes": 5, "crc32": 7}}),
            ["index.parquet: not the file", "fingerprint", "copy both again"],
        ),
        (
            lambda folder: change_facts(folder, splits={"train": {"images": 11}}),
            ["index.parquet: lists 18 images", "says 11 train", "re-pack"],
        ),
        (
            lambda folder: (change_facts(folder, files={}), drop_column(folder / "index.parquet", "view")),
            ["index.parquet: no column view", "pack"],
        ),
        (lambda folder: (folder / "query-000000.tar").unlink(), ["query-000000.tar: no such file", "copy it again"]),
        (lambda folder: cut(folder / "query-000000.tar", 900), ["query-000000.tar: 900 bytes", "copy it again"]),
    ],
)
def test_a_damaged_dataset_is_refused_in_one_line_with_the_remedy(tiny, damage, words):
    opened(tiny)
    damage(tiny)
    with pytest.raises(DataError) as error:
        opened(tiny)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert str(tiny) in message


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere/dataset.json: no such file"):
        opened(tmp_path / "nowhere")


def test_a_cache_folder_that_cannot_be_written_is_named(tiny):
    (tiny.parent / "file").write_text("")
    with pytest.raises(DataError, match="data.cache_dir"):
        ShardIndex.open(str(tiny), str(tiny.parent / "file"))
