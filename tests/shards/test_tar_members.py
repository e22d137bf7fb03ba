"""A tar's headers are claims: what they say is checked before memory is taken for it."""

import gzip
import os
import tarfile
import time

import numpy as np
import pytest

from shards.errors import DataError
from shards.format import BadTar, first_member, tar_members
from shards.loading.index import ShardIndex
from shards.loading.sequential import SequentialLoader
from shards.loading.tar_images import TarImages
from shards.packing.verify import verify
from tests.helpers.shards import write_shards

SPARSE_1_0 = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 15}


def member(name="a.jpg", data=b"x" * 700, **facts):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


def sparse_of_a_terabyte():
    """An old GNU header: one byte at the end of a hole of 1 TiB."""
    header = bytearray(member(type=tarfile.GNUTYPE_SPARSE)[:512])
    header[257:265] = b"ustar  \0"
    header[386:410] = b"%011o\0%011o\0" % (1 << 32, 512)
    header[483:495] = b"%011o\0" % ((1 << 33) - 1)
    header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
    return bytes(header) + b"x" * 512


def odd_tars():
    good = member()
    yield "sparse", sparse_of_a_terabyte()
    yield "sparse 1.0 without a map", member(pax_headers=SPARSE_1_0, data=b"9" * 512)
    yield "pax size", member(pax_headers={"size": str(1 << 50)})
    yield "negative size", member(pax_headers={"size": "-512"})
    yield "cut", good[:900]
    yield "link", member(type=tarfile.SYMTYPE, linkname="/etc/passwd", data=b"")
    yield "folder", member(type=tarfile.DIRTYPE, data=b"")
    yield "compressed", gzip.compress(good + bytes(1 << 20))
    yield "no tar", os.urandom(2048)


@pytest.mark.parametrize(("name", "data"), odd_tars(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_member_that_is_no_whole_regular_file_is_refused_without_its_memory(name, data):
    start = time.monotonic()
    with pytest.raises(BadTar) as caught:
        list(tar_members(data))
    assert "\n" not in str(caught.value)
    info, content = first_member(data)
    assert info is None or len(content) <= len(data)
    assert time.monotonic() - start < 2


def test_members_that_are_whole_are_read_as_they_are_also_under_long_names():
    files = {"a.jpg": b"x" * 700, "张" * 90 + ".json": b"{}", "empty.png": b""}
    data = b"".join(member(name, content) for name, content in files.items()) + bytes(1024)
    assert dict(tar_members(data)) == files


@pytest.fixture
def packed(tmp_path):
    return write_shards(tmp_path / "s", {"train": {"a": 3, "b": 3}, "query": {"c": 2}})


def read_all(url):
    images = TarImages(ShardIndex.open(url), "train", (8, 8))
    return [batch.images for batch in SequentialLoader(images, rank=0, world_size=1, batch_size=2)]


@pytest.mark.parametrize("kind", ["sparse", "twice"])
def test_a_shard_with_an_odd_member_is_refused_by_name_where_images_are_read_and_verified(kind, packed, tmp_path):
    path = tmp_path / "s" / "train-000000.tar"
    data = path.read_bytes()
    second = data.index(b"_00000.json") // 512 * 512
    odd = {
        "sparse": sparse_of_a_terabyte()[:512],
        "twice": data[:512],
    }[kind]
    path.write_bytes(data[:second] + odd + data[second + 512 :])
    with pytest.raises(DataError, match="shard train-000000.tar, key a_0000[01]: ") as caught:
        read_all(packed)
    assert "\n" not in str(caught.value)
    report = verify(packed)
    assert report.problems and all("\n" not in str(problem) for problem in report.problems)


def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(packed, tmp_path):
    for name in ("train-000000.tar", "index.parquet", "dataset.json"):
        path = tmp_path / "s" / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DataError, match=name):
            read_all(packed)
        path.unlink()
        path.write_bytes(content)
    assert np.shape(read_all(packed)[0]) == (2, 3, 8, 8)
