"""What other users of the machine can write to is not trusted: the node's cache folder, and files in it."""

import os
import tempfile
from pathlib import Path

import pytest

from shards.errors import DataError
from shards.loading.cache import CacheSettings, node_cache_dir
from shards.loading.index import ShardIndex
from shards.loading.reader import shard_cache
from shards.private import open_own
from tests.helpers.http_server import serving
from tests.helpers.shards import write_shards

SPLITS = {"train": {f"{n}": 2 for n in range(4)}}
NOBODY = 65534


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The system's temporary folder."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def mode(path):
    return path.lstat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_the_cache_folder_is_closed_to_all_others(place, umask):
    before = os.umask(umask)
    try:
        folder = node_cache_dir(None)
    finally:
        os.umask(before)
    assert folder.parent == place and mode(folder) == 0o700
    folder.chmod(0o755)  # as earlier versions made it: others could read, not write
    assert node_cache_dir(None) == folder and mode(folder) == 0o700


def belongs_to_nobody(folder):
    folder.mkdir()
    try:
        os.chown(folder, NOBODY, NOBODY)
    except PermissionError:
        pytest.skip("files are given away by root alone")


PLANTED = {
    "a link": (lambda folder: folder.symlink_to(folder.parent), "is a link"),
    "a dangling link": (lambda folder: folder.symlink_to("nowhere"), "is a link"),
    "a file": (lambda folder: folder.touch(), "is no folder"),
    "open to all": (lambda folder: (folder.mkdir(), folder.chmod(0o777)), r"written to by others \(mode 0777\)"),
    "open to a group": (lambda folder: (folder.mkdir(), folder.chmod(0o770)), r"written to by others \(mode 0770\)"),
    "another's": (belongs_to_nobody, f"belongs to user {NOBODY}, not to"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_cache_folder_is_refused_at_every_start_with_the_remedy(planted, place, tmp_path):
    plant, words = PLANTED[planted]
    folder = place / f"clipreid-cache-{os.getuid()}"
    plant(folder)
    write_shards(tmp_path / "data", SPLITS)
    for _ in range(2):
        with pytest.raises(DataError, match=f"{words}.*: remove it, or give another folder as data.cache_dir") as error:
            ShardIndex.open(str(tmp_path / "data"))
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("shared", [0o1777, 0o2775])
def test_in_a_given_folder_that_others_can_write_to_the_cache_is_a_folder_of_its_user(shared, tmp_path):
    """A disk of the node's that all users share."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(shared)
    folder = node_cache_dir(str(tmp_path / "scratch"))
    assert folder.parent == tmp_path / "scratch" and mode(folder) == 0o700
    assert node_cache_dir(str(tmp_path / "mine" / "cache")) == tmp_path / "mine" / "cache"
    assert mode(tmp_path / "mine" / "cache") == 0o700


VICTIM = b"precious"


@pytest.mark.parametrize("link", ["shards/.lock", "shards/DATA/train-000000.tar.part", "shards/DATA/train-000000.tar"])
def test_a_link_in_the_cache_is_never_followed(link, tmp_path):
    victim, cache = tmp_path / "victim", tmp_path / "cache"
    victim.write_bytes(VICTIM)
    with serving(Path(write_shards(tmp_path / "data", SPLITS))) as server:
        shards = shard_cache(ShardIndex.open(server.url, str(cache)), CacheSettings())
        path = cache / link.replace("DATA", shards.folder.name)
        path.parent.mkdir(parents=True)
        path.symlink_to(victim)
        with pytest.raises(DataError, match=f"{path}: is not a file but a link .* remove it"):
            shards.fetch("train-000000.tar")
    assert victim.read_bytes() == VICTIM and path.is_symlink()


@pytest.mark.parametrize("link", ["shards", "shards/DATA", "index"])
def test_a_folder_of_the_cache_that_is_a_link_is_refused(link, tmp_path):
    elsewhere, cache = tmp_path / "elsewhere", tmp_path / "cache"
    elsewhere.mkdir()
    with serving(Path(write_shards(tmp_path / "data", SPLITS))) as server:
        name = ShardIndex.open(server.url, str(tmp_path / "other")).address
        path = cache / link.replace("DATA", name)
        path.parent.mkdir(parents=True)
        path.symlink_to(elsewhere)
        with pytest.raises(DataError, match=f"{path}: is a link"):
            shard_cache(ShardIndex.open(server.url, str(cache)), CacheSettings()).fetch("train-000000.tar")
    assert not list(elsewhere.iterdir())


def test_making_room_in_the_cache_removes_nothing_behind_a_link(tmp_path):
    elsewhere, cache = tmp_path / "elsewhere", tmp_path / "cache"
    elsewhere.mkdir()
    (elsewhere / "precious").write_bytes(VICTIM * 1000)
    with serving(Path(write_shards(tmp_path / "data", SPLITS))) as server:
        index = ShardIndex.open(server.url, str(cache))
        shards = shard_cache(index, CacheSettings(limit_bytes=index.shard_bytes("train-000000.tar")))
        shards.folder.mkdir(parents=True)
        (shards.root / "linked").symlink_to(elsewhere)
        (shards.folder / "linked").symlink_to(elsewhere / "precious")
        shards.fetch("train-000000.tar").close()
    assert (elsewhere / "precious").read_bytes() == VICTIM * 1000


def only_copy(cache):
    (path,) = (cache / "index").glob("*.arrays")
    return path


def test_a_copy_of_another_index_is_not_taken_for_this_ones(tmp_path):
    """Its own checksum is right; it was made of another packing."""
    one, other, cache = tmp_path / "one", tmp_path / "other", tmp_path / "cache"
    write_shards(one, {"train": {"a": 2, "b": 2}})
    write_shards(other, {"train": {"b": 2, "a": 1, "c": 1}})
    expected = ShardIndex.open(str(one), str(cache)).split("train").identity.tolist()
    ShardIndex.open(str(other), str(tmp_path / "second"))
    only_copy(cache).write_bytes(only_copy(tmp_path / "second").read_bytes())
    assert ShardIndex.open(str(one), str(cache)).split("train").identity.tolist() == expected


def test_a_link_in_place_of_the_copy_of_an_index_is_refused(tmp_path):
    write_shards(tmp_path / "data", SPLITS)
    ShardIndex.open(str(tmp_path / "data"), str(tmp_path / "cache"))
    path = only_copy(tmp_path / "cache")
    path.rename(tmp_path / "planted.arrays")
    path.symlink_to(tmp_path / "planted.arrays")
    with pytest.raises(DataError, match=f"{path}: is not a file but a link"):
        ShardIndex.open(str(tmp_path / "data"), str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["pipe", "folder", "another's"])
def test_only_files_of_the_user_are_opened(kind, tmp_path):
    path = tmp_path / "thing"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        try:
            os.chown(path, NOBODY, NOBODY)
        except PermissionError:
            pytest.skip("files are given away by root alone")
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
        with pytest.raises(DataError, match=f"{path}: .* remove it"):
            open_own(path, flags)
