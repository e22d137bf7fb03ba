"""What a packed dataset or a table cannot hold is refused in one line, before memory is taken for it."""

import json
import resource
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.dataset_file import read_dataset_json
from shards.errors import DataError
from shards.format import index_schema
from shards.index_table import read_index_table
from shards.loading.index import ShardIndex
from shards.packing.build import build
from shards.packing.verify import verify
from shards.storage import read_text
from tests.helpers.shards import write_shards


@pytest.fixture
def packed(tmp_path):
    """A packed dataset that lists no checksums of its files, as older ones do: its index has to speak for itself."""
    folder = tmp_path / "s"
    write_shards(folder, {"train": {"a": 3, "b": 3}, "query": {"c": 2}})
    change_facts(folder, lambda facts: facts.update(files={}))
    return folder


def change_facts(folder, change):
    facts = json.loads((folder / "dataset.json").read_text())
    change(facts)
    (folder / "dataset.json").write_text(json.dumps(facts))


def change_column(folder, name, change):
    table = pq.read_table(folder / "index.parquet")
    column = pa.array(change(table.column(name).to_pylist()), index_schema().field(name).type)
    pq.write_table(table.set_column(table.column_names.index(name), name, column), folder / "index.parquet")


def refused(call, *words):
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and all(word in message for word in words), message
    assert time.monotonic() - start < 10


def replaced(row, value):
    return lambda values: [value if place == row else old for place, old in enumerate(values)]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("offset", replaced(1, -512), "offset holds -512"),
        ("offset", replaced(1, 1 << 62), "offset holds 4611686018427387904"),
        ("size", replaced(0, -1), "size holds -1"),
        ("label", lambda values: [value + 1 if value >= 0 else value for value in values], "without gaps"),
        ("label", replaced(0, 1), "several"),
        ("label", replaced(0, 10**9), "label holds"),
        ("label", lambda values: [0] * len(values), "outside of train"),
        ("camera", replaced(0, 3), "camera holds 3, but dataset.json has 3"),
        ("view", replaced(0, -2), "view holds -2"),
        ("split", replaced(0, "val"), "split holds 'val'"),
        ("shard", replaced(0, "../../x.tar"), "no name of a file"),
        ("key", replaced(0, "x" * 1_000_000), "1,000,000 bytes"),
        ("identity", replaced(0, "x" * 5000), "5,000 bytes"),
        ("time", replaced(0, None), "empty cells"),
    ],
)
def test_an_index_whose_column_holds_what_no_packing_writes_is_refused(packed, name, change, words):
    change_column(packed, name, change)
    refused(lambda: ShardIndex.open(str(packed), str(packed / "cache")), f"{packed}/index.parquet: ", words)
    refused(lambda: read_index_table(str(packed), read_dataset_json(str(packed))), words)


def test_an_index_with_a_column_twice_is_refused(packed):
    table = pq.read_table(packed / "index.parquet")
    pq.write_table(table.append_column("key", table.column("key")), packed / "index.parquet")
    refused(lambda: ShardIndex.open(str(packed), str(packed / "cache")), "has column key twice")


@pytest.mark.parametrize("text", ["x" * 1_000_000, "y" * 4000])
def test_a_small_index_of_millions_of_long_texts_takes_neither_memory_nor_time(packed, text):
    rows = 3_000_000
    zeros, columns = np.zeros(rows, np.int32), {}
    for field in index_schema():
        is_text = pa.types.is_string(field.type)
        value = text if field.name == "key" else "train"
        texts = pa.DictionaryArray.from_arrays(zeros, pa.array([value])) if is_text else None
        columns[field.name] = texts if is_text else pa.array(zeros).cast(field.type)
    pq.write_table(pa.table(columns), packed / "index.parquet", compression="zstd")
    assert (packed / "index.parquet").stat().st_size < 10_000_000
    change_facts(packed, lambda facts: facts.update(splits={"train": {"images": rows}}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: ShardIndex.open(str(packed), str(packed / "cache")), "column key has")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KB


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: facts.update(files={"a.tar": {"bytes": 5, "crc32": -1}}), "files.a.tar does not say its crc32"),
        (lambda facts: facts.update(files={"a.tar": {"crc32": 1}}), "files.a.tar does not say how many bytes"),
        (lambda facts: facts.update(files={"../a.tar": {"bytes": 5, "crc32": 1}}), "no name of a file"),
        (lambda facts: facts.update(cameras=10**12), "cameras is 1000000000000"),
        (lambda facts: facts.update(views=-1), "views is -1"),
        (lambda facts: facts.update(noun="x\ny"), "noun is 'x\\ny'"),
        (lambda facts: facts["splits"].update(val={"images": 3}), "splits has 'val'"),
        (lambda facts: facts["splits"]["train"].update(images=True), "splits.train does not say how many images"),
        (lambda facts: facts["splits"]["train"].update(images=10**30), "splits.train does not say how many images"),
    ],
)
def test_a_dataset_file_with_what_no_packing_writes_is_refused(packed, change, words):
    change_facts(packed, change)
    refused(lambda: read_dataset_json(str(packed)), "dataset.json: ", words)


def test_a_shard_whose_checksum_is_not_listed_is_read_and_verified_all_the_same(tmp_path):
    url = write_shards(tmp_path / "s", {"train": {"a": 3, "b": 3}})
    change_facts(tmp_path / "s", lambda facts: facts["files"]["train-000000.tar"].pop("crc32"))
    assert len(ShardIndex.open(url, str(tmp_path / "cache")).split("train")) == 6
    assert all("\n" not in str(problem) for problem in verify(url).problems)


HEADER = "path,identity,split\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"{HEADER}a\0b.jpg,x,train\n".encode(), ("row 1", "NUL")),
        (f"{HEADER}{'x' * 300}.jpg,x,train\n".encode(), ("row 1", "304 bytes")),
        (f"{HEADER}a.jpg,{'x' * 5000},train\n".encode(), ("row 1", "identity is longer")),
        (HEADER.replace(",", ";").encode(), ("line 1", "semicolons", "commas")),
        (HEADER.replace(",", "\t").encode(), ("line 1", "tabs")),
        (b",path,identity,split\n0,a.jpg,x,train\n", ("line 1", "pandas", "index=False")),
        (b"path,identity,split,,\n", ("line 1", "column 4 has no name")),
        (f"{HEADER}张.jpg,x,train\n".encode("gbk"), ("line 2", "UTF-8")),
        (HEADER.encode("utf-16"), ("line 1", "UTF-16")),
    ],
)
def test_a_table_as_other_programs_write_it_is_refused_with_the_line_and_what_to_choose(content, words, tmp_path):
    (tmp_path / "m.csv").write_bytes(content)
    refused(lambda: build("manifest", [str(tmp_path / "m.csv")], str(tmp_path / "out"), processes=1), *words)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "t").write_bytes("\ufeffa".encode())
    assert read_text(str(tmp_path / "t")) == "a"
