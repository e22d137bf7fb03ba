"""Sequential passes: every image exactly once and in order, exact pixels, and no silence about what is broken."""

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from shards.errors import DataError
from shards.loading.index import ShardIndex
from shards.loading.sequential import SequentialLoader
from shards.loading.tar_images import TarImages
from tests.helpers.shards import picture, write_shards

SPLITS = {"query": {f"{n}": 1 + n % 3 for n in range(9)}, "gallery": {f"{n:02d}": 1 + n % 7 for n in range(15)}}
SIZE = (30, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """52 gallery images in 6 shards, JPEG, PNG and WebP."""
    root = tmp_path_factory.mktemp("shards")
    return write_shards(root / "tiny", SPLITS, images_per_shard=9, kinds=("jpg", "png", "webp"))


def index_of(folder):
    return ShardIndex.open(str(folder), str(Path(folder).parent / "cache"))


def loader_of(folder, split="gallery", rank=0, world_size=1, batch_size=8, **options):
    images = TarImages(index_of(folder), split, SIZE)
    return SequentialLoader(images, rank=rank, world_size=world_size, batch_size=batch_size, **options)


def rows_of(loader):
    return [row for batch in loader for row in batch.rows.tolist()]


def test_every_image_once_and_in_order_for_any_ranks_and_batch_sizes(folder):
    for split in ("query", "gallery"):
        total = len(index_of(folder).split(split))
        for world_size in (1, 2, 3, 5, 16, 60):
            for batch_size in (1, 7, 64):
                loaders = [loader_of(folder, split, rank, world_size, batch_size) for rank in range(world_size)]
                per_rank = [rows_of(loader) for loader in loaders]
                assert [row for rows in per_rank for row in rows] == list(range(total))
                assert max(map(len, per_rank)) - min(map(len, per_rank)) <= 1


@pytest.mark.parametrize("num_loaders", [1, 3])
def test_decoding_processes_give_the_same_batches(folder, num_loaders):
    for world_size in (1, 2):
        for rank in range(world_size):
            alone = list(loader_of(folder, rank=rank, world_size=world_size))
            shared = list(loader_of(folder, rank=rank, world_size=world_size, num_loaders=num_loaders))
            assert len(alone) == len(shared) > 0
            for one, other in zip(alone, shared, strict=True):
                assert torch.equal(one.rows, other.rows)
                assert torch.equal(one.images, other.images)


def test_more_processes_than_images_are_no_problem(folder):
    assert rows_of(loader_of(folder, "query", num_loaders=5, batch_size=100)) == list(range(18))
    parts = [rows_of(loader_of(folder, "query", rank, 40, num_loaders=2)) for rank in (0, 1, 2, 3)]
    assert parts == [[], [], [0], []]


def test_a_loader_can_be_used_again_and_left_early(folder):
    loader = loader_of(folder)
    first = next(iter(loader))
    assert torch.equal(next(iter(loader)).images, first.images)
    assert rows_of(loader) == rows_of(loader)


def test_images_are_bilinear_and_exact(folder):
    split = index_of(folder).split("gallery")
    for batch in loader_of(folder):
        assert batch.images.dtype == torch.uint8
        assert batch.rows.dtype == torch.int64
        for image, row in zip(batch.images, batch.rows.tolist(), strict=True):
            shard = (Path(folder) / split.shard_names[split.shard[row]]).read_bytes()
            data = shard[split.offsets[row] : split.offsets[row] + split.sizes[row]]
            with Image.open(io.BytesIO(data)) as picture_:
                expected = picture_.convert("RGB").resize(SIZE[::-1], Image.BILINEAR)
            difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected))
            assert difference.max() <= 2
            assert difference.mean() <= 0.5


def test_plain_webdataset_reads_what_the_index_lists(folder):
    """The shards that the other tests here read are what any other program takes for WebDataset shards."""
    split = index_of(folder).split("gallery")
    dataset = webdataset.WebDataset(
        [f"{folder}/{name}" for name in split.shard_names if "gallery" in name], shardshuffle=False
    )
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == split.keys.tolist()
    for sample, crc in zip(samples, split.crc32, strict=True):
        (image,) = [sample[kind] for kind in ("jpg", "png", "webp") if kind in sample]
        assert zlib.crc32(image) == crc


def copy_of(tmp_path, make=picture):
    return write_shards(tmp_path / "copy", {"gallery": {f"{n}": 4 for n in range(6)}}, images_per_shard=8, make=make)


def damage(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("num_loaders", [0, 2])
def test_a_flipped_byte_of_an_image_is_an_error_with_shard_and_key(tmp_path, num_loaders):
    copy = copy_of(tmp_path)
    split = index_of(copy).split("gallery")
    damage(Path(copy) / split.shard_names[split.shard[10]], split.offsets[10] + 50)
    with pytest.raises(DataError) as error:
        rows_of(loader_of(copy, batch_size=5, num_loaders=num_loaders))
    assert str(error.value).startswith(f"{split.where(10)}: its bytes don't fit the checksum")
    assert "\n" not in str(error.value)


def test_a_flipped_byte_anywhere_in_the_archive_never_changes_the_images_silently(tmp_path):
    """In headers and padding too: the pass fails and names the shard, or its pixels are right."""
    copy = copy_of(tmp_path)
    expected = torch.cat([batch.images for batch in loader_of(copy)])
    shard = Path(copy) / "gallery-000001.tar"
    whole = shard.read_bytes()
    failures = 0
    for place in range(3, len(whole), 397):
        damage(shard, place)
        try:
            assert torch.equal(torch.cat([batch.images for batch in loader_of(copy)]), expected)
        except DataError as error:
            failures += 1
            assert "shard gallery-000001.tar, key " in str(error)
        shard.write_bytes(whole)
    assert failures > 20


def test_an_archive_with_other_members_than_the_index_lists_is_an_error(tmp_path):
    copy = copy_of(tmp_path)
    path = Path(copy) / "gallery-000001.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            member.name = member.name.replace("2_00010", "2_99999")
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(DataError, match=r"shard gallery-000001.tar, key 2_00010: the archive holds key 2_99999"):
        rows_of(loader_of(copy))


def test_an_image_that_cannot_be_decoded_is_an_error_with_shard_and_key(tmp_path):
    copy = copy_of(tmp_path, lambda number, kind: picture(number)[:300] if number == 10 else picture(number))
    with pytest.raises(DataError, match=r"shard gallery-000001.tar, key 2_00010: can't be decoded .*re-pack"):
        rows_of(loader_of(copy))
