"""Shards behind S3 and HTTP: retries, the node's cache, and never a wrong byte."""

import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from shards import remote
from shards.errors import DataError
from shards.loading.cache import Busy, CacheSettings, Prefetcher, ShardCache, node_cache_dir
from shards.loading.decode import pick_images
from shards.loading.index import ShardIndex
from shards.loading.pk_loader import PKLoader
from shards.loading.pk_sampler import PKSettings, epoch_plan, rank_part, shards_needed
from shards.loading.reader import RowReader, shard_cache
from shards.loading.sequential import SequentialLoader
from shards.loading.tar_images import TarImages
from shards.source import ShardSource
from tests.helpers.http_server import Handler, serving
from tests.helpers.object_store import s3_server
from tests.helpers.shards import write_shards

SETTINGS = PKSettings(identities=4, images_per_identity=3, seed=2)
SIZE = (24, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """16 training identities in 8 shards of about 25 KB, and a gallery in 2."""
    splits = {"train": {f"{n:02d}": 4 + n % 4 for n in range(16)}, "gallery": {f"{n}": 4 for n in range(4)}}
    return write_shards(tmp_path_factory.mktemp("remote") / "data", splits, images_per_shard=8)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)


def pk_batches(url, cache, epochs=(1,), cache_bytes=10**9, **options):
    index, settings = ShardIndex.open(str(url), str(cache)), CacheSettings(limit_bytes=cache_bytes)
    loader = PKLoader(index, settings=SETTINGS, image_size=SIZE, rank=0, world_size=1, cache=settings, **options)
    try:
        return [batch for epoch in epochs for batch in loader.epoch(epoch)]
    finally:
        loader.close()


def gallery(url, cache, cache_bytes=10**9, num_loaders=0):
    index, settings = ShardIndex.open(str(url), str(cache)), CacheSettings(limit_bytes=cache_bytes)
    images = TarImages(index, "gallery", SIZE, settings)
    return list(SequentialLoader(images, rank=0, world_size=1, batch_size=5, num_loaders=num_loaders))


def assert_same(batches, expected):
    assert len(batches) == len(expected) > 0
    for one, other in zip(batches, expected, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.images, other.images)


def test_http_gives_the_same_batches_as_the_folder(folder, tmp_path):
    with serving(folder) as server:
        assert_same(pk_batches(server.url, tmp_path), pk_batches(folder, tmp_path))
        assert_same(gallery(server.url, tmp_path), gallery(folder, tmp_path))


@pytest.mark.parametrize("num_loaders", [0, 2])
def test_a_server_that_fails_a_third_of_the_requests_costs_only_time(folder, tmp_path, num_loaders):
    with serving(folder, fail=lambda number: number % 3 == 0) as server:
        batches = pk_batches(server.url, tmp_path, (1, 2), num_loaders=num_loaders)
        assert_same(batches, pk_batches(folder, tmp_path, (1, 2)))
        assert_same(gallery(server.url, tmp_path, num_loaders=num_loaders), gallery(folder, tmp_path))
        assert len(server.requests) > 10


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_a_server_that_cuts_transfers_never_gives_a_wrong_byte(folder, tmp_path, cache_bytes):
    with serving(folder, cut=lambda number: number % 3 == 1) as server:
        assert_same(pk_batches(server.url, tmp_path, cache_bytes=cache_bytes), pk_batches(folder, tmp_path))
        assert_same(gallery(server.url, tmp_path, cache_bytes=cache_bytes), gallery(folder, tmp_path))
    for cached in tmp_path.glob("shards/*/*.tar"):
        assert cached.read_bytes() == (Path(folder) / cached.name).read_bytes()
    assert bool(list(tmp_path.glob("shards/*/*.tar"))) == bool(cache_bytes)


def test_a_server_without_ranges_is_an_error_that_says_so(folder, tmp_path, monkeypatch):
    class WithoutRanges(Handler):
        def answer(self, body):
            del self.headers["Range"]
            super().answer(body)

    with serving(folder) as server:
        server.RequestHandlerClass = WithoutRanges
        with pytest.raises(DataError, match=r"train-00000.\.tar: failed 10 times.*ignores range requests"):
            pk_batches(server.url, tmp_path, cache_bytes=0)


def test_pictures_of_a_remote_dataset_are_those_of_the_folder(folder, tmp_path):
    with serving(folder) as server:
        remote_index, index = (ShardIndex.open(url, str(tmp_path)) for url in (server.url, folder))
        found = pick_images(remote_index, "gallery", [5, 0, 3], SIZE)
        assert torch.equal(found, pick_images(index, "gallery", [5, 0, 3], SIZE))


def test_a_server_that_is_not_there_is_an_error_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.05)  # the real one
    start = time.monotonic()
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9/dataset.json: failed 7 times.*check the address") as error:
        ShardIndex.open("http://127.0.0.1:9", str(tmp_path))
    assert time.monotonic() - start < 5
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["nosuch://bucket/data", "http://127.0.0.1:{port}/nowhere"])
def test_a_wrong_address_is_refused(folder, tmp_path, url):
    with serving(folder) as server, pytest.raises(DataError, match=r"nosuch|nowhere/dataset.json: no such file"):
        ShardIndex.open(url.format(port=server.server_port), str(tmp_path))


def test_the_images_of_an_identity_are_read_with_one_request(folder, tmp_path):
    with serving(folder) as server:
        split = ShardIndex.open(server.url, str(tmp_path)).split("train")
        plan = epoch_plan(split, SETTINGS, 1)
        del server.requests[:]
        reader = RowReader(split, shard_cache(split.index, CacheSettings(limit_bytes=0)), fetch=False)
        assert all(isinstance(data, np.ndarray) for data in reader.read(plan[0].reshape(-1)))
        assert 0 < len(server.requests) <= SETTINGS.identities
        assert all(asked for _, asked in server.requests)


def cached(tmp_path):
    return sorted(path.name for path in tmp_path.glob("shards/*/*.tar"))


def wait_for(condition, within_s=10):
    until = time.monotonic() + within_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def test_shards_are_fetched_once_in_the_order_of_need_and_then_read_from_the_cache(folder, tmp_path):
    with serving(folder) as server:
        index = ShardIndex.open(server.url, str(tmp_path))
        train = index.split("train")
        loader = PKLoader(index, settings=SETTINGS, image_size=SIZE, rank=0, world_size=1)
        next(loader.epoch(1))
        wait_for(lambda: len(cached(tmp_path)) == 8)
        whole = [path for path, asked in server.requests if asked and asked.startswith("bytes=0-")]
        fetched = [path.lstrip("/") for path in dict.fromkeys(whole)]
        needed = [train.shard_names[shard] for shard in shards_needed(train, epoch_plan(train, SETTINGS, 1))]
        assert fetched == needed
        del server.requests[:]
        list(loader.epoch(2))
        assert not server.requests
        loader.close()


def test_with_locality_a_node_fetches_its_own_shards_only(folder, tmp_path):
    settings = PKSettings(identities=4, images_per_identity=3, seed=2, virtual_nodes=2)
    with serving(folder) as server:
        index = ShardIndex.open(server.url, str(tmp_path))
        train = index.split("train")
        loader = PKLoader(index, settings=settings, image_size=SIZE, rank=1, world_size=2)
        del server.requests[:]
        next(loader.epoch(3))
        loader._prefetcher._thread.join()
        expected = set()
        for epoch in (3, 4):  # this epoch's and, after them, the next one's
            expected |= set(shards_needed(train, rank_part(epoch_plan(train, settings, epoch), 1, 2)))
        own = [train.shard_names[shard] for shard in sorted(expected)]
        assert cached(tmp_path) == own
        assert {path.lstrip("/") for path, _ in server.requests} == set(own)
        loader.close()


def test_every_epoch_is_fetched_ahead_though_the_last_one_fills_the_cache(folder, tmp_path):
    """A limit of 1.3 parts: the last epoch's are still being read when this epoch's are asked for."""
    settings = PKSettings(identities=4, images_per_identity=3, seed=2, virtual_nodes=2)
    with serving(folder) as server:
        index = ShardIndex.open(server.url, str(tmp_path))
        train = index.split("train")

        def needed(epoch):
            shards = shards_needed(train, rank_part(epoch_plan(train, settings, epoch), 0, 2))
            return {train.shard_names[shard] for shard in shards}

        part_bytes = max(sum(map(index.shard_bytes, needed(epoch))) for epoch in (1, 2, 3, 4))
        options = {"settings": settings, "image_size": SIZE, "rank": 0, "world_size": 2, "num_loaders": 1}
        loader = PKLoader(index, **options, cache=CacheSettings(limit_bytes=int(1.3 * part_bytes)))
        for epoch in (1, 2, 3, 4):
            reader = cache_of(server.url, tmp_path)  # another process still reads what there is
            slow = [file for name in cached(tmp_path) if (file := reader.open(name))]
            batches = loader.epoch(epoch)
            found = [next(batches)]
            time.sleep(0.1)
            for file in slow:
                file.close()
            wait_for(lambda epoch=epoch: needed(epoch) <= set(cached(tmp_path)))
            found += batches
            local = PKLoader(ShardIndex.open(folder, str(tmp_path)), **options | {"num_loaders": 0})
            assert_same(found, list(local.epoch(epoch)))
        loader.close()


def cache_of(url, tmp_path, limit_bytes=10**9):
    return shard_cache(ShardIndex.open(url, str(tmp_path)), CacheSettings(limit_bytes=limit_bytes))


def test_the_cache_evicts_what_was_opened_longest_ago_and_keeps_to_its_limit(folder, tmp_path):
    with serving(folder) as server:
        names = sorted(path.name for path in Path(folder).glob("train-*.tar"))
        sizes = {name: (Path(folder) / name).stat().st_size for name in names}
        cache = cache_of(server.url, tmp_path, sum(sorted(sizes.values())[-3:]))
        for name in names[:3]:
            cache.fetch(name).close()
        old = time.time() - 100
        for age, name in enumerate(names[:3]):
            os.utime(next(tmp_path.glob(f"shards/*/{name}")), (old + age, old + age))
        cache.open(names[0]).close()
        cache.fetch(names[3]).close()
        assert names[1] not in cached(tmp_path)
        assert {names[0], names[3]} <= set(cached(tmp_path))
        for name in names:
            cache.fetch(name).close()
            assert sum(path.stat().st_size for path in tmp_path.glob("shards/*/*")) <= cache.limit_bytes


def test_the_cache_never_evicts_what_is_in_use(folder, tmp_path):
    with serving(folder) as server:
        names = sorted(path.name for path in Path(folder).glob("train-*.tar"))
        cache = cache_of(server.url, tmp_path, sum((Path(folder) / name).stat().st_size for name in names[:2]))
        used = [cache.fetch(name) for name in names[:2]]
        assert cache.fetch(names[2]) is None  # no room: it is read from its source
        assert cached(tmp_path) == names[:2]
        used[0].close()
        assert cache.fetch(names[2]) is not None or cache.fetch(names[3]) is not None
        assert names[1] in cached(tmp_path)
        assert_same(pk_batches(server.url, tmp_path, cache_bytes=cache.limit_bytes), pk_batches(folder, tmp_path))


def test_what_is_needed_now_takes_the_room_of_what_was_fetched_for_later(folder, tmp_path):
    with serving(folder) as server:
        names = sorted(path.name for path in Path(folder).glob("train-*.tar"))
        cache = cache_of(server.url, tmp_path, sum(sorted((Path(folder) / name).stat().st_size for name in names)[-2:]))
        prefetcher = Prefetcher(cache)
        prefetcher.start(names[:2])
        wait_for(lambda: cached(tmp_path) == names[:2])
        prefetcher.start([names[2], names[1], names[0]])
        wait_for(lambda: cached(tmp_path) == names[1:3])
        prefetcher.close()


def test_a_cache_smaller_than_a_shard_or_of_no_size_is_passed_by(folder, tmp_path):
    with serving(folder) as server:
        assert_same(gallery(server.url, tmp_path, cache_bytes=100), gallery(folder, tmp_path))
        assert not cached(tmp_path)


FETCH = """
import sys
from shards.loading.cache import CacheSettings
from shards.loading.index import ShardIndex
from shards.loading.reader import shard_cache
index = ShardIndex.open(sys.argv[1], sys.argv[2])
for name in index.shard_names:
    data = shard_cache(index, CacheSettings(limit_bytes=10**9)).fetch(name).read()
    assert data == open(sys.argv[3] + "/" + name, "rb").read(), name
"""


def test_processes_of_a_node_fetch_each_shard_once(folder, tmp_path):
    with serving(folder, content=slow_content) as server:
        command = [sys.executable, "-c", FETCH, server.url, str(tmp_path), folder]
        processes = [subprocess.Popen(command) for _ in range(3)]
        assert [process.wait() for process in processes] == [0, 0, 0]
        gets = [path for path, asked in server.requests if asked]
        assert len(gets) == len(set(gets)) == 10


def slow_content(path):
    time.sleep(0.02)
    return path.read_bytes()


def test_a_fetch_that_was_killed_is_done_anew(folder, tmp_path):
    reached = threading.Event()

    def stuck_once(path):
        if path.suffix == ".tar" and not reached.is_set():
            reached.set()
            time.sleep(2)
        return path.read_bytes()

    with serving(folder, content=stuck_once) as server:
        process = subprocess.Popen([sys.executable, "-c", FETCH, server.url, str(tmp_path), folder])
        assert reached.wait(20)
        process.kill()
        process.wait()
        (left,) = tmp_path.glob("shards/*/*.part")
        assert left.stat().st_size > 0
        cache = cache_of(server.url, tmp_path)
        data = cache.fetch(left.name.removesuffix(".part")).read()
        assert data == (Path(folder) / left.name.removesuffix(".part")).read_bytes()
        assert not left.exists()


def test_a_shard_that_another_process_fetches_is_not_waited_for_when_fetching_ahead(folder, tmp_path):
    with serving(folder) as server:
        cache = cache_of(server.url, tmp_path)
        name = "train-000000.tar"
        cache.folder.mkdir(parents=True)
        with open(cache.folder / f"{name}.part", "wb") as part:
            fcntl.flock(part, fcntl.LOCK_EX)
            with pytest.raises(Busy):
                cache.fetch(name, wait=False)
            prefetcher = Prefetcher(cache)
            prefetcher.start([name, "train-000001.tar"])
            wait_for(lambda: cached(tmp_path) == ["train-000001.tar"])
        wait_for(lambda: cached(tmp_path) == [name, "train-000001.tar"])
        prefetcher.close()


def damage_cached(tmp_path, place):
    for path in tmp_path.glob("shards/*/*.tar"):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("place", [700, 150])  # in the first image, and in its header
def test_a_damaged_cached_shard_is_fetched_again(folder, tmp_path, place, caplog):
    with serving(folder) as server:
        for read in (gallery, pk_batches):
            read(server.url, tmp_path)
            wait_for(lambda: not list(tmp_path.glob("shards/*/*.part")))
        damage_cached(tmp_path, place)
        with caplog.at_level(logging.WARNING):
            assert_same(gallery(server.url, tmp_path), gallery(folder, tmp_path))
            assert_same(pk_batches(server.url, tmp_path, (1, 2)), pk_batches(folder, tmp_path, (1, 2)))
        assert "gallery-000000.tar: the cached copy is damaged" in caplog.text
        for path in tmp_path.glob("shards/*/*.tar"):
            if place == 700 or path.name.startswith("gallery"):  # PK batches read no headers
                assert path.read_bytes() == (Path(folder) / path.name).read_bytes()


@pytest.mark.parametrize("resize", [lambda length: 0, lambda length: length // 2, lambda length: length + 512])
def test_a_cached_shard_of_the_wrong_size_is_fetched_again(folder, tmp_path, resize):
    with serving(folder) as server:
        cache = cache_of(server.url, tmp_path)
        for path in Path(folder).glob("*.tar"):
            cache.fetch(path.name).close()
            os.truncate(next(tmp_path.glob(f"shards/*/{path.name}")), resize(path.stat().st_size))
        assert_same(pk_batches(server.url, tmp_path), pk_batches(folder, tmp_path))
        assert_same(gallery(server.url, tmp_path), gallery(folder, tmp_path))
    for path in tmp_path.glob("shards/*/*.tar"):
        assert path.read_bytes() == (Path(folder) / path.name).read_bytes()


def test_an_image_damaged_at_its_source_is_an_error_with_shard_and_key(tmp_path):
    splits = {"train": {f"{n:02d}": 4 for n in range(6)}, "gallery": {"a": 4}}
    copy = Path(write_shards(tmp_path / "data", splits, images_per_shard=8))
    for split in ("train", "gallery"):
        path = copy / f"{split}-000000.tar"
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data)
    with serving(copy) as server:
        for read in (pk_batches, gallery):
            for cache_bytes in (0, 10**9):
                with pytest.raises(DataError, match=r"shard (train|gallery)-000000.tar, key \S+: .* checksum"):
                    read(server.url, tmp_path / "cache", cache_bytes=cache_bytes)


def test_bytes_damaged_on_the_way_are_fetched_again(folder, tmp_path):
    """The first answer from each shard has the right length and wrong bytes; checksums find them."""
    seen = set()

    def content(path):
        data = bytearray(path.read_bytes())
        if path.suffix == ".tar" and path not in seen:
            seen.add(path)
            data[600:-512:700] = bytes(value ^ 1 for value in data[600:-512:700])
        return bytes(data)

    with serving(folder, content=content) as server:
        assert_same(pk_batches(server.url, tmp_path, cache_bytes=0), pk_batches(folder, tmp_path))
        assert_same(gallery(server.url, tmp_path, cache_bytes=0), gallery(folder, tmp_path))


def test_a_shard_whose_checksum_is_wrong_is_fetched_a_second_time(folder, tmp_path, caplog):
    path = Path(folder) / "train-000000.tar"
    right = path.read_bytes()
    answers = [right[:600] + b"?" + right[601:], right]
    with serving(folder, content=lambda path: answers.pop(0)) as server:
        files = {path.name: {"bytes": len(right), "crc32": zlib.crc32(right)}}
        cache = ShardCache(ShardSource(server.url), files, "data", tmp_path, 10**9)
        assert cache.fetch(path.name).read() == right
    assert "arrived with a wrong checksum" in caplog.text


@pytest.fixture(scope="module")
def s3(folder):
    """moto's S3 on loopback with the dataset in a bucket; yields its URL."""
    with s3_server("datasets") as bucket:
        fsspec.filesystem("s3").put(folder, f"{bucket}/tiny", recursive=True)
        yield f"{bucket}/tiny"


@pytest.mark.parametrize("num_loaders", [0, 2])
def test_s3_gives_the_same_batches_as_the_folder(folder, s3, tmp_path, num_loaders):
    assert_same(pk_batches(s3, tmp_path, (1, 2), num_loaders=num_loaders), pk_batches(folder, tmp_path, (1, 2)))
    assert_same(gallery(s3, tmp_path, num_loaders=num_loaders), gallery(folder, tmp_path))
    assert "gallery-000001.tar" in cached(tmp_path)


def test_s3_with_ranged_reads_only_gives_the_same_batches(folder, s3, tmp_path):
    assert_same(pk_batches(s3, tmp_path, cache_bytes=0), pk_batches(folder, tmp_path))
    assert_same(gallery(s3, tmp_path, cache_bytes=0), gallery(folder, tmp_path))
    assert not cached(tmp_path)


def test_a_dataset_without_checksums_of_its_files_is_cached_all_the_same(tmp_path):
    """dataset.json need not list them; records have their own."""
    copy = Path(write_shards(tmp_path / "data", {"train": {f"{n}": 4 for n in range(4)}, "gallery": {"a": 9}}))
    facts = json.loads((copy / "dataset.json").read_text())
    del facts["files"]
    (copy / "dataset.json").write_text(json.dumps(facts))
    with serving(copy) as server:
        assert_same(gallery(server.url, tmp_path), gallery(copy, tmp_path))
        assert cached(tmp_path) == ["gallery-000000.tar"]


def test_a_bucket_or_prefix_that_is_not_there_is_refused(s3, tmp_path):
    for url in ("s3://nobucket/tiny", "s3://datasets/nothing"):
        with pytest.raises(DataError, match=r"dataset.json: no such file"):
            ShardIndex.open(url, str(tmp_path))


def test_the_default_cache_belongs_to_the_user():
    assert str(os.getuid()) in node_cache_dir(None).name
