"""PK batches as pixels: which images, how exact, on how many processes, and what a broken record does."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.ranks.team import Team
from cluster.settings.yaml_file import parse_config
from cluster.training.stage2 import Stage2
from shards.errors import DataError
from shards.loading.decode import decode, resize_into
from shards.loading.index import ShardIndex
from shards.loading.pk_loader import PKLoader
from shards.loading.pk_sampler import PKSettings, epoch_plan
from tests.helpers.devices import DEVICE, on_gpu
from tests.helpers.shards import picture, write_shards

SETTINGS = PKSettings(identities=4, images_per_identity=3, seed=5)
SIZE = (40, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 identities, 67 images in JPEG, PNG and WebP, some identities with fewer than K images."""
    splits = {"train": {f"{n:02d}": 2 + n % 8 for n in range(12)}}
    return write_shards(
        tmp_path_factory.mktemp("shards") / "tiny", splits, images_per_shard=20, kinds=("jpg", "png", "webp")
    )


def index_of(folder):
    return ShardIndex.open(str(folder), str(Path(folder).parent / "cache"))


def loader_of(folder, **options):
    defaults = {"settings": SETTINGS, "image_size": SIZE, "rank": 0, "world_size": 1}
    return PKLoader(index_of(folder), **defaults | options)


def bytes_of(split, row):
    shard = Path(split.index.url) / split.shard_names[split.shard[row]]
    return shard.read_bytes()[split.offsets[row] : split.offsets[row] + split.sizes[row]]


def by_pillow(data, size, filter_):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((size[1], size[0]), filter_)).transpose(2, 0, 1)


def test_batches_hold_the_images_the_plan_names(folder):
    split = index_of(folder).split("train")
    plan = epoch_plan(split, SETTINGS, 2)
    batches = list(loader_of(folder).epoch(2))
    assert len(batches) == len(plan)
    for step, (batch, rows) in enumerate(zip(batches, plan, strict=True), 1):
        assert (batch.epoch, batch.epoch_step) == (2, step)
        assert batch.images.shape == (12, 3, *SIZE)
        assert batch.images.dtype == torch.uint8
        rows = rows.reshape(-1)
        for name, expected in [
            ("rows", rows),
            ("labels", split.labels[rows]),
            ("cameras", split.cameras[rows]),
            ("views", split.views[rows]),
            ("positions", np.arange(12)),
        ]:
            found = getattr(batch, name)
            assert found.dtype == torch.int64
            np.testing.assert_array_equal(found, expected)
        for place, row in enumerate(rows):
            expected = by_pillow(bytes_of(split, row), SIZE, Image.BICUBIC).astype(int)
            difference = np.abs(batch.images[place].numpy().astype(int) - expected)
            assert difference.max() <= 2
            assert difference.mean() <= 0.5


def stacked(batches):
    return [(batch.rows.tolist(), batch.images) for batch in batches]


def test_decoding_processes_give_the_same_batches_and_survive_many_epochs(folder):
    alone = loader_of(folder)
    loader = loader_of(folder, num_loaders=2, prefetch=3)
    for epoch in (1, 2, 3):
        for ours, expected in zip(stacked(loader.epoch(epoch)), stacked(alone.epoch(epoch)), strict=True):
            assert ours[0] == expected[0]
            assert torch.equal(ours[1], expected[1])
    loader.close()


@pytest.mark.parametrize("num_loaders", [0, 2])
def test_an_epoch_can_start_at_every_step_and_be_left_at_any(folder, num_loaders):
    loader = loader_of(folder, num_loaders=num_loaders)
    batches = stacked(loader.epoch(1))
    assert loader.steps_per_epoch(1) == len(batches)
    for start in range(1, len(batches) + 2):
        left = loader.epoch(2)  # begun and never finished
        next(left)
        rest = list(loader.epoch(1, start))
        assert [batch.epoch_step for batch in rest] == list(range(start, len(batches) + 1))
        for ours, expected in zip(stacked(rest), batches[start - 1 :], strict=True):
            assert ours[0] == expected[0]
            assert torch.equal(ours[1], expected[1])
    loader.close()


def test_ranks_hold_the_parts_of_one_global_batch(folder):
    whole = list(loader_of(folder).epoch(1))
    for world_size in (2, 4):
        parts = [list(loader_of(folder, rank=rank, world_size=world_size).epoch(1)) for rank in range(world_size)]
        for step, batch in enumerate(whole):
            for name in ("images", "labels", "cameras", "views", "positions", "rows"):
                joined = torch.cat([getattr(part[step], name) for part in parts])
                assert torch.equal(joined, getattr(batch, name))


def test_a_batch_stays_as_it_is_when_the_next_ones_come(folder):
    loader = loader_of(folder, num_loaders=1, prefetch=2)
    batches = list(loader.epoch(1))
    for batch, again in zip(batches, loader.epoch(1), strict=True):
        assert torch.equal(batch.images, again.images)
    loader.close()


def test_ranks_that_do_not_divide_a_batch_are_refused(folder):
    with pytest.raises(DataError, match="4 identities .* 3 workers"):
        loader_of(folder, world_size=3)


def flip_byte(folder, row, place=-10):
    """Damage one image; returns what errors call it."""
    split = index_of(folder).split("train")
    path = Path(folder) / split.shard_names[split.shard[row]]
    data = bytearray(path.read_bytes())
    data[split.offsets[row] + split.sizes[row] + place] ^= 1
    path.write_bytes(data)
    return split.where(row)


def write_copy(tmp_path, make=picture):
    return write_shards(tmp_path / "copy", {"train": {f"{n:02d}": 6 for n in range(8)}}, images_per_shard=20, make=make)


@pytest.mark.parametrize("num_loaders", [0, 1])
def test_a_flipped_byte_is_found_when_the_record_is_read(tmp_path, num_loaders):
    copy = write_copy(tmp_path)
    where = flip_byte(copy, 17)
    loader = loader_of(copy, num_loaders=num_loaders)
    with pytest.raises(DataError) as error:
        list(loader.epoch(1))
    assert str(error.value).startswith(where)
    assert "checksum" in str(error.value)
    assert "copy the shard again" in str(error.value)
    assert "\n" not in str(error.value)
    loader.close()


@pytest.mark.parametrize("broken", [b"not an image", picture(0)[:400], picture(0, kind="png")[:500], b""])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, broken):
    copy = write_copy(tmp_path, lambda number, kind: broken if number == 17 else picture(number))
    where = index_of(copy).split("train").where(17)
    with pytest.raises(DataError) as error:
        list(loader_of(copy).epoch(1))
    assert str(error.value).startswith(f"{where}: can't be decoded")
    assert "data.on_error=skip" in str(error.value)


@pytest.mark.parametrize("num_loaders", [0, 2])
def test_with_skip_the_next_readable_image_of_the_identity_takes_the_place(tmp_path, num_loaders, caplog):
    """Rows 12-17 are one identity: 13 and 14 are broken, so 15 stands in for both; 17 is, so 12 does."""
    copy = write_copy(tmp_path, lambda number, kind: b"broken" if number in (14, 17) else picture(number))
    where = flip_byte(copy, 13)
    split = index_of(copy).split("train")
    loader = loader_of(copy, num_loaders=num_loaders, on_error="skip")
    with caplog.at_level(logging.WARNING):
        batches = [*loader.epoch(1), *loader.epoch(2)]
    plan = np.concatenate([epoch_plan(split, SETTINGS, epoch) for epoch in (1, 2)]).reshape(len(batches), -1)
    stands_in = np.arange(len(split))
    stands_in[[13, 14, 17]] = 15, 15, 12
    for batch, rows in zip(batches, plan, strict=True):
        np.testing.assert_array_equal(batch.rows, stands_in[rows])
        for place, row in enumerate(stands_in[rows]):
            out = np.empty((3, *SIZE), np.uint8)
            resize_into(out, decode(np.frombuffer(bytearray(bytes_of(split, row)), np.uint8)), "bicubic")
            np.testing.assert_array_equal(batch.images[place], out)
    assert loader.num_skipped == 3
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 3  # each once, however often it comes
    assert sum(where in warning and "checksum" in warning for warning in warnings) == 1
    loader.close()


def test_stage_2_skips_as_many_as_the_configuration_says_and_counts_them_in_the_log(tmp_path, caplog):
    copy = write_copy(tmp_path, lambda number, kind: b"broken" if 11 < number < 15 else picture(number))
    for limit, stops in ((3, False), (2, True)):
        config = parse_config(
            {
                "data": {"shards": str(copy), "on_error": "skip", "skip_limit": limit, "loaders": 0},
                "model": {"image_size": SIZE},
                "stage2": {"identities": 4, "images_per_identity": 3},
            }
        )
        stage = SimpleNamespace(config=config, team=Team(0, 1, 0))
        loader = Stage2._loader(stage, index_of(copy))
        with caplog.at_level(logging.WARNING), pytest.raises(DataError) if stops else contextlib.nullcontext() as error:
            list(loader.epoch(1))
        assert not stops or "more than 2 images (data.skip_limit) can't be read" in str(error.value)
    for count in (1, 2, 3):
        assert f"skipped, {count} of at most 3: shard " in caplog.text


def test_skipping_is_fatal_after_a_limit_and_for_an_identity_without_readable_images(tmp_path):
    copy = write_copy(tmp_path, lambda number, kind: b"broken" if 11 < number < 15 else picture(number))
    with pytest.raises(DataError, match=r"more than 2 images .* can't be read, the last one: shard .*, key "):
        list(loader_of(copy, on_error="skip", skip_limit=2).epoch(1))
    copy = write_copy(tmp_path, lambda number, kind: b"broken" if 11 < number < 18 else picture(number))
    with pytest.raises(DataError, match="no image of identity 02 can be read"):
        list(loader_of(copy, on_error="skip").epoch(1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK"])
def test_odd_image_modes_become_rgb_as_pillow_sees_them(mode, tmp_path):
    image = Image.open(io.BytesIO(picture(3))).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG" if mode in ("L", "CMYK") else "PNG", quality=95)
    expected = by_pillow(file.getvalue(), (32, 24), Image.BICUBIC).astype(int)
    found = decode(np.frombuffer(bytearray(file.getvalue()), np.uint8)).numpy().astype(int)
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_is_within_two_grey_levels_of_pillow(interpolation):
    """Up and down, odd sizes, sharp edges and noise: the worst that the filters can meet."""
    rng = np.random.default_rng(0)
    sizes = [((128, 64), (256, 128)), ((300, 120), (256, 128)), ((401, 399), (256, 256)), ((7, 5), (40, 60))]
    sizes += [((900, 1200), (64, 64)), ((256, 128), (256, 128)), ((86, 76), (13, 36)), ((69, 19), (32, 11))]
    for source, target in sizes:
        pixels = rng.integers(0, 256, (*source, 3), dtype=np.uint8)
        pixels[: source[0] // 2] = pixels[: source[0] // 2] // 128 * 255
        out = np.empty((3, *target), np.uint8)
        resize_into(out, torch.from_numpy(pixels).permute(2, 0, 1), interpolation)
        filter_ = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[interpolation]
        expected = np.asarray(Image.fromarray(pixels).resize(target[::-1], filter_))
        difference = np.abs(out.transpose(1, 2, 0).astype(int) - expected)
        assert difference.max() <= 2
        assert difference.mean() <= 0.5


def test_a_dataset_packed_anew_is_noticed_by_the_decoding_processes(tmp_path):
    loader = loader_of(write_copy(tmp_path), num_loaders=1)
    write_copy(tmp_path, lambda number, kind: picture(number + 1))
    with pytest.raises(DataError, match="packed anew while it was in use"):
        list(loader.epoch(1))
    loader.close()


def test_an_unknown_way_to_treat_errors_is_refused(folder):
    with pytest.raises(DataError, match="data.on_error is 'ignore'; known: raise, skip"):
        loader_of(folder, on_error="ignore")


def test_the_benchmark_takes_all_ways_through_the_same_images(tmp_path):
    from launch.benchmarks import loader as benchmark

    benchmark.write_images(tmp_path / "images", (20, 30), identities=16, each=4)
    benchmark.build("manifest", [str(tmp_path / "images" / "images.csv")], str(tmp_path / "shards"), processes=1)
    index = index_of(tmp_path / "shards")
    split = index.split("train")
    plan = epoch_plan(split, benchmark.SETTINGS, 1).reshape(-1, 64)
    paths = [tmp_path / "images" / f"{key}.jpg" for key in split.keys]
    ways = {name: partial(make, index, paths, plan, (24, 16), 0) for name, make in benchmark.WAYS.items()}
    for make in ways.values():
        assert [batch.shape for batch in make()()] == [(64, 3, 24, 16)] * len(plan)
    result = benchmark.in_turn(ways, 1, plan.size, time.perf_counter)
    assert result["b_over_a"] == pytest.approx(result["b_images_per_s"] / result["a_images_per_s"], rel=0.05)


@on_gpu
def test_batches_for_a_gpu_are_pinned(folder):
    there = DEVICE == "cuda"
    batch = next(loader_of(folder, pin_memory=there).epoch(1))
    columns = ("images", "labels", "cameras", "views", "positions")
    assert [getattr(batch, name).is_pinned() for name in columns] == [there] * len(columns)


def children(pid, generations=2):
    """Processes whose parent is pid, and theirs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid:
                found.append(int(entry.name))
    return found + [pid for child in found for pid in children(child, generations - 1)] if generations > 1 else found


def gone(pids, within_s):
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_a_killed_decoding_process_is_an_error_and_not_a_hang(folder, capfd):
    loader = loader_of(folder, num_loaders=1)
    list(loader.epoch(1))
    (decoder,) = [pid for host in children(os.getpid(), 1) for pid in children(host, 1)]
    os.kill(decoder, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a decoding process died.*data\.loaders"):
        list(loader.epoch(2))
    assert len(list(loader.epoch(2))) > 0  # the pool starts anew
    left = [pid for host in children(os.getpid(), 1) for pid in children(host, 1)]
    loader.close()
    assert left
    assert gone(left, within_s=5)


def test_no_process_outlives_its_killed_caller():
    code = (
        "import os, signal, sys; from functools import partial; from shards.loading.decode_pool import DecodePool\n"
        "pool = DecodePool(partial(dict.get, {'job': 'done'}), 'os', (64,), num_loaders=2, num_slots=2)\n"
        "print(*(result for result, _ in pool.run(['job'] * 3)), flush=True)\n"
        "sys.stdin.read()"
    )
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as caller:
        assert caller.stdout.readline() == "done done done\n"
        pids = children(caller.pid)
        caller.kill()
    assert len(pids) == 3
    assert gone(pids, within_s=60)
