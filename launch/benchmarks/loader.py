"""Images per second from shards to PK batches, beside the usual one file per image, Pillow and torchvision code.

    python launch/bench.py loader
    python launch/bench.py loader --cases 120x300:256x128 --identities 40 --rounds 3

(a) usual: open, decode, resize, pad, crop, to tensor, normalise and erase one file after another, then stack
(b) ours, from shards to the uint8 batch: all that a CPU does when a GPU augments
(c) ours, to the augmented float32 batch on the CPU
All three go through the same images in the same order. "one_core": in this process, images per second of processor
time, warm. "two_workers": two processes, by the clock. "cold": this process, by the clock, each time with a new
loader and after a request to the system to drop the files from its memory.
"""

import csv
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from clipreid.augment import augment
from launch.cli import Parser, local_place
from launch.measure.published import AUGMENT
from shards.loading.index import ShardIndex
from shards.loading.pk_loader import PKLoader
from shards.loading.pk_sampler import PKSettings, epoch_plan
from shards.packing.build import build

CASES = ("64x128:128x256", "120x300:128x256", "400x400:256x256")
"""Width x height of the JPEGs and of the network's input."""
SETTINGS = PKSettings(identities=16, images_per_identity=4)
Batches = Callable[[], Iterable[torch.Tensor]]
Size = tuple[int, int]


def run(arguments: list[str]) -> dict[str, Any]:
    """Images per second of (a), (b) and (c) for each case, and how many times as fast as (a) ours are."""
    parser = Parser(prog="bench.py loader", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES, type=_case, metavar="WxH:WxH")
    parser.add_argument("--identities", type=int, default=100, help="of 8 images each (default 100)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=local_place, help="folder for the temporary files (default: the system's)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for source, target in [_case(case) if isinstance(case, str) else case for case in options.cases]:
        with tempfile.TemporaryDirectory(prefix="bench-loader-", dir=options.work) as folder:
            rows.append(time_case(Path(folder), source, target, options.identities, options.rounds))
    return {"load_average": round(os.getloadavg()[0], 1), "rounds": options.rounds, "cases": rows}


def time_case(
    folder: Path, source: tuple[int, int], target: tuple[int, int], identities: int, rounds: int
) -> dict[str, Any]:
    """One row of the result. source, target: width and height of the JPEGs and of the network's input, pixels."""
    mean_bytes = write_images(folder / "images", source, identities)
    build("manifest", [str(folder / "images" / "images.csv")], str(folder / "shards"), processes=1)
    index = ShardIndex.open(str(folder / "shards"), str(folder / "cache"))
    plan = epoch_plan(index.split("train"), SETTINGS, 1).reshape(-1, SETTINGS.identities * SETTINGS.images_per_identity)
    paths = [folder / "images" / f"{key}.jpg" for key in index.split("train").keys]
    files = [*paths, *(folder / "shards").iterdir()]
    size = (target[1], target[0])
    alone = {name: partial(make, index, paths, plan, size, 0) for name, make in WAYS.items()}
    shared = {name: partial(make, index, paths, plan, size, 2) for name, make in WAYS.items()}
    row = {
        "jpeg": "x".join(map(str, source)),
        "input": "x".join(map(str, target)),
        "mean_jpeg_bytes": mean_bytes,
        "images_per_epoch": plan.size,
        "one_core": warm(alone, rounds, plan.size, time.process_time),
        "two_workers": warm(shared, rounds, plan.size, time.perf_counter),
    }
    if hasattr(os, "posix_fadvise"):
        row["cold"] = in_turn(alone, min(rounds, 3), plan.size, time.perf_counter, lambda: forget(files))
    return row


def warm(ways: Mapping[str, Callable[[], Batches]], *settings: Any) -> dict[str, float]:
    """`in_turn` with loaders that are made once. They are gone afterwards, so nothing keeps the shards mapped."""
    return in_turn({name: cache(make) for name, make in ways.items()}, *settings)


def in_turn(
    ways: Mapping[str, Callable[[], Batches]],
    rounds: int,
    images: int,
    clock: Callable[[], float],
    before: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median images per second over rounds in which each way has its turn, and the ratios to (a).

    ways: functions that make the loaders; that is not counted, and neither is a first round, which warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    batches = None
    for number in range(rounds + 1):
        for name, make in ways.items():
            batches = make()  # and the one before lets go of the shards
            before()
            start = clock()
            seen = sum(len(batch) for batch in batches())
            seconds[name].append(clock() - start)
            assert seen == images, (name, seen, images)
            if number == 0:
                seconds[name].clear()
    speed = {name: images / statistics.median(values) for name, values in seconds.items()}
    return {f"{name}_images_per_s": round(value) for name, value in speed.items()} | {
        f"{name}_over_a": round(speed[name] / speed["a"], 2) for name in ("b", "c")
    }


def usual(index: ShardIndex, paths: list[Path], plan: np.ndarray, size: Size, num_loaders: int) -> Batches:
    """(a)"""
    transform = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(AUGMENT.flip),
            transforms.Pad(AUGMENT.pad),
            transforms.RandomCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(AUGMENT.mean, AUGMENT.std),
            transforms.RandomErasing(AUGMENT.erase, value="random"),
        ]
    )
    files = _Files(paths, transform)
    context: dict[str, Any] = {"multiprocessing_context": "spawn", "persistent_workers": True} if num_loaders else {}
    return DataLoader(files, batch_sampler=plan.tolist(), num_workers=num_loaders, **context).__iter__


class _Files(Dataset):
    def __init__(self, paths: list[Path], transform: Callable):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        with Image.open(self.paths[row]) as image:
            return self.transform(image.convert("RGB"))


def to_uint8(
    index: ShardIndex, paths: list[Path], plan: np.ndarray, size: tuple[int, int], num_loaders: int
) -> Batches:
    """(b)"""
    loader = PKLoader(index, settings=SETTINGS, image_size=size, rank=0, world_size=1, num_loaders=num_loaders)
    return lambda: (batch.images for batch in loader.epoch(1))


def to_float(
    index: ShardIndex, paths: list[Path], plan: np.ndarray, size: tuple[int, int], num_loaders: int
) -> Batches:
    """(c)"""
    loader = PKLoader(index, settings=SETTINGS, image_size=size, rank=0, world_size=1, num_loaders=num_loaders)
    return lambda: (
        augment(batch.images, batch.positions, seed=0, epoch=1, epoch_step=batch.epoch_step, settings=AUGMENT)
        for batch in loader.epoch(1)
    )


WAYS = {"a": usual, "b": to_uint8, "c": to_float}


def write_images(folder: Path, size: tuple[int, int], identities: int, each: int = 8) -> int:
    """JPEGs with the detail of a photo, and their manifest. Returns their mean size, bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lengths = []
    with open(folder / "images.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerows(
            [("path", "identity", "split"), *(("000000.jpg", "0", split) for split in ("query", "gallery"))]
        )
        for number in range(identities * each):
            coarse = rng.integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
            pixels = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)) + rng.normal(
                0, 5, (*size[::-1], 1)
            )
            data = io.BytesIO()
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(data, "JPEG", quality=85)
            (folder / f"{number:06d}.jpg").write_bytes(data.getvalue())
            table.writerow([f"{number:06d}.jpg", f"{number // each:05d}", "train"])
            lengths.append(len(data.getvalue()))
    return round(statistics.mean(lengths))


def forget(files: list[Path]) -> None:
    """Ask the system to drop the files from its memory; what is mapped or not yet written stays."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _case(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    (width, height), (new_width, new_height) = [map(int, part.split("x")) for part in text.split(":")]
    return (width, height), (new_width, new_height)
