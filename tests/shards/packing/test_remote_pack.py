"""build, verify and inspect with remote sources and outputs: retries, and what a store that fails is called."""

import logging
import shutil

import pytest

from launch import pack as command
from launch.cli import user_mistake
from shards import remote, storage
from shards.errors import DataError, StoreError
from shards.index_table import read_index_table
from shards.packing.build import build
from shards.packing.contact_sheet import write_sheet
from shards.packing.overview import Overview
from shards.packing.verify import verify
from tests.helpers.http_server import serving
from tests.helpers.layouts import make_manifest, make_market, tree_bytes
from tests.helpers.object_store import s3_server


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_manifest(tmp_path_factory.mktemp("source"), train=6, images=5)


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    build("manifest", [str(source)], str(out), name="mine", processes=1)
    return out


@pytest.fixture(scope="module")
def bucket():
    with s3_server("packs") as url:
        yield url


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)


FAULTS = {"fail": {"fail": lambda number: number % 3 == 0}, "cut": {"cut": lambda number: number % 3 == 1}}


@pytest.mark.parametrize("fault", FAULTS)
def test_build_from_a_failing_server_into_a_bucket_gives_the_same_bytes(fault, source, packed, bucket, tmp_path):
    with serving(source.parent, **FAULTS[fault]) as server:
        build("manifest", [f"{server.url}/{source.name}"], f"{bucket}/{fault}", name="mine", processes=1)
    for name, data in tree_bytes(packed).items():
        assert storage.read_bytes(f"{bucket}/{fault}/{name}") == data
    assert storage.list_folder(f"{bucket}/{fault}") == sorted(tree_bytes(packed))


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_and_inspect_see_the_same_through_a_failing_server(fault, packed, tmp_path):
    local = verify(str(packed), decode_all=True)
    with serving(packed, **FAULTS[fault]) as server:
        assert verify(server.url, decode_all=True) == local
        assert [vars(s) for s in map(_plain, Overview.read(server.url).splits)] == [
            vars(s) for s in map(_plain, Overview.read(str(packed)).splits)
        ]
        for url, name in ((server.url, "remote.png"), (str(packed), "local.png")):
            write_sheet(url, tmp_path / name)
    assert (tmp_path / "remote.png").read_bytes() == (tmp_path / "local.png").read_bytes()


def _plain(split):
    object.__setattr__(split, "images_per_identity", split.images_per_identity.tolist())
    return split


def test_verify_names_a_flipped_byte_in_a_bucket(packed, bucket, tmp_path):
    copy = shutil.copytree(packed, tmp_path / "copy")
    row = read_index_table(str(copy)).to_pylist()[7]
    shard = copy / row["shard"]
    data = bytearray(shard.read_bytes())
    data[row["offset"] + 9] ^= 1
    shard.write_bytes(data)
    for path in copy.iterdir():
        with storage.write_atomic(f"{bucket}/flipped/{path.name}") as file:
            file.write(path.read_bytes())
    assert [(p.file, p.key) for p in verify(f"{bucket}/flipped").problems] == [(row["shard"], row["key"])]
    storage.remove(f"{bucket}/flipped/{row['shard']}")
    (problem,) = verify(f"{bucket}/flipped").problems
    assert problem.file == row["shard"] and problem.what.startswith("missing")


def test_a_zip_behind_a_failing_server_is_read_in_small_pieces(tmp_path):
    make_market(tmp_path / "market")
    shutil.make_archive(str(tmp_path / "market"), "zip", tmp_path / "market")
    build("market1501", [str(tmp_path / "market")], str(tmp_path / "out"), processes=1)
    with serving(tmp_path, fail=lambda number: number % 3 == 0) as server:
        build("market1501", [f"{server.url}/market.zip"], str(tmp_path / "remote"), processes=1)
    for path in (tmp_path / "out").glob("*.tar"):
        assert (tmp_path / "remote" / path.name).read_bytes() == path.read_bytes()


def test_a_server_without_listings_is_verified_all_the_same(packed, caplog):
    with serving(packed, forbid=lambda path: path == "/") as server, caplog.at_level(logging.WARNING):
        assert verify(server.url).problems == []
    assert "not looked for shards" in caplog.text and "403" in caplog.text


def reading(url):
    """What a user may do with what is at that address."""
    return {
        "verify": lambda: command.main(["verify", url]),
        "inspect": lambda: command.main(["inspect", url]),
        "build from it": lambda: build("manifest", [f"{url}/images.csv"], "memory://never", processes=1),
        "a folder": lambda: build("market1501", [url], "memory://never", processes=1),
        "a zip": lambda: build("market1501", [f"{url}/a.zip"], "memory://never", processes=1),
        "look for a file": lambda: storage.exists(f"{url}/config.yaml"),
        "read a part": lambda: storage.open_read(f"{url}/features.npz").read(10),
    }


def assert_told(calls, url, *words):
    for name, call in calls.items():
        with pytest.raises(StoreError) as error:
            call()
        message = user_mistake(error.value)
        assert message.startswith(url) and "\n" not in message, (name, message)
        assert all(word in message for word in words), (name, message)


def test_a_store_that_cannot_be_reached_is_told_with_its_address_and_a_remedy():
    assert_told(reading("http://127.0.0.1:9"), "http://127.0.0.1:9", "failed 7 times", "check the address")
    assert_told(reading("nosuch://a/b"), "nosuch://a/b", "not known", "check the address")


def test_a_refusal_is_told_at_once_with_its_address_and_a_remedy(source, monkeypatch):
    with serving(source.parent, forbid=lambda path: True) as server:
        assert_told(reading(server.url), server.url, "403", "check the credentials")
        assert len(server.requests) <= 2 * len(reading(server.url))  # HEAD and GET


def test_a_store_that_always_fails_is_told_and_not_taken_for_an_empty_one(source):
    with serving(source.parent, fail=lambda number: True) as server:
        assert_told(reading(server.url), server.url, "failed 7 times", "503")


def test_s3_without_credentials_or_bucket_is_told(source, bucket, monkeypatch):
    import s3fs

    with pytest.raises(DataError, match="s3://nobucket/x/dataset.json: no such file, so this is no packed dataset"):
        verify("s3://nobucket/x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    calls = reading(bucket) | {"build into it": lambda: build("manifest", [str(source)], bucket, processes=1)}
    assert_told(calls, bucket, "access denied", "check the credentials")
    s3fs.S3FileSystem.clear_instance_cache()
