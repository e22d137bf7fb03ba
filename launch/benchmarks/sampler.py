"""Open the index of a large dataset and plan epochs of PK batches, beside the usual Python loop.

python launch/bench.py sampler                  a made-up index of VehicleID's counts
python launch/bench.py sampler --size million   20,000,000 images of 1,000,000 identities
python launch/bench.py sampler --shards URL     a packed dataset
"""

import json
import os
import random
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from launch.cli import Parser, place
from launch.measure.memory import PeakMemory
from shards.errors import DataError
from shards.format import DATASET_FILE, FORMAT_VERSION, INDEX_FILE, index_schema, shard_name
from shards.loading.index import ShardIndex, SplitIndex
from shards.loading.pk_sampler import STRATEGIES, PKSettings, epoch_plan


@dataclass(frozen=True)
class Size:
    """Of a made-up index."""

    images: int
    train_images: int
    identities: int
    train_identities: int
    rounds: int
    """How often each figure is measured."""
    plain: bool = True
    """Whether the plain loop ends: its time grows with the square of the identities."""


SIZES = {
    "vehicleid": Size(221_763, 113_346, 26_267, 13_164, rounds=5),
    "million": Size(20_000_000, 20_000_000, 1_000_000, 1_000_000, rounds=1, plain=False),
}
SHARD_IMAGES = 8000
PIECE_IMAGES = 1 << 20
MOST_SHARD_BYTES = 40_000 * PIECE_IMAGES
"""Where the last image of a piece may end."""
"""Rows of an index that are made up at a time."""
VIRTUAL_NODES = 4


def run(arguments: list[str]) -> dict[str, Any]:
    """Seconds and memory to open the index and to plan an epoch, of each strategy; the plain loop's seconds."""
    parser = Parser(prog="bench.py sampler", description=__doc__)
    parser.add_argument(
        "--shards", type=place, help="a packed dataset, folder or URL (default: a made-up index of --size)"
    )
    parser.add_argument("--size", choices=SIZES, default="vehicleid", help="of the made-up index (default vehicleid)")
    parser.add_argument("--identities", type=int, default=16, help="P (default 16)")
    parser.add_argument("--images-per-identity", type=int, default=4, help="K (default 4)")
    parser.add_argument("--rounds", type=int, help="(default 5; with --size million 1)")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    rounds = size.rounds if options.rounds is None else options.rounds
    with tempfile.TemporaryDirectory(prefix="bench-sampler-") as folder:
        url, cache = options.shards or made_up_index(Path(folder) / "shards", size), Path(folder) / "cache"
        settings = PKSettings(options.identities, options.images_per_identity)
        return time_sampler(url, cache, settings, rounds, plain=size.plain)


def time_sampler(url: str, cache: Path, settings: PKSettings, rounds: int, plain: bool = True) -> dict[str, Any]:
    """Open the index of a packed dataset and plan its epochs. cache: a folder that may be deleted.

    Raises DataError where the dataset has too few training identities for a batch.
    """
    with PeakMemory() as memory:
        opened = {"first_on_the_node": median(lambda: open_anew(url, cache), rounds)}
    opened_mb = megabytes(memory)
    opened["after_that"] = median(lambda: ShardIndex.open(url, str(cache)).split("train"), rounds)
    opened["after_that_and_columns_checked"] = median(lambda: open_and_use(url, cache), rounds)
    index = ShardIndex.open(url, str(cache))
    train = index.split("train")
    several = {name: replace(settings, strategy=name) for name in STRATEGIES}
    several[f"identity, {VIRTUAL_NODES} virtual nodes"] = replace(settings, virtual_nodes=VIRTUAL_NODES)
    plans: dict[str, float | None] = {}
    peaks_mb: dict[str, int] = {}
    for name, one in several.items():
        with PeakMemory() as memory:
            plans[name] = plan_seconds(train, one, rounds)
        peaks_mb[name] = megabytes(memory)
    batch = settings.identities, settings.images_per_identity
    plain_s = median(lambda: plain_epoch(train.labels, *batch, 0), 1) if plain else None
    return {
        "index_images": len(index),
        "train_images": len(train),
        "train_identities": train.num_identities,
        "identities_per_batch": settings.identities,
        "steps_per_epoch": len(epoch_plan(train, settings, 1)),
        "load_average": round(os.getloadavg()[0], 1),
        "cores": len(os.sched_getaffinity(0)),
        "open_index_s": opened,
        "open_index_peak_memory_mb": opened_mb,
        "plan_epoch_s": plans,
        "plan_epoch_peak_memory_mb": peaks_mb,
        "plain_loop_s": plain_s,
        "speed_over_plain_loop": round(plain_s / plans["identity"], 1) if plain_s and plans["identity"] else None,
    }


def megabytes(memory: PeakMemory) -> int:
    """Of the whole process, its libraries and the pages of the index that it has looked at included."""
    return round(memory.peak_bytes / 1e6)


def median(work: Callable[[], object], rounds: int) -> float:
    durations = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        durations.append(time.perf_counter() - start)
    return round(statistics.median(durations), 4)


def open_and_use(url: str, cache: Path) -> None:
    train = ShardIndex.open(url, str(cache)).split("train")
    assert len(train.labels) == len(train.identity_codes) == len(train.shard)


def open_anew(url: str, cache: Path) -> None:
    shutil.rmtree(cache, ignore_errors=True)
    open_and_use(url, cache)


def plan_seconds(train: SplitIndex, settings: PKSettings, rounds: int) -> float | None:
    """None where the dataset has no cameras, or too few shards."""
    epochs = iter(range(1, rounds + 1))
    try:
        return median(lambda: epoch_plan(train, settings, next(epochs)), rounds)
    except DataError:
        return None


def plain_epoch(labels: np.ndarray, batch: int, size: int, seed: int) -> list[int]:
    """One epoch as ReID samplers are usually written: dictionaries, lists and the random module."""
    rng = random.Random(seed)
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        rows.setdefault(label, []).append(row)
    groups = {}
    for label, own in rows.items():
        own = own if len(own) >= size else rng.choices(own, k=size)
        rng.shuffle(own)
        groups[label] = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
    left, epoch = list(groups), []
    while len(left) >= batch:
        for label in rng.sample(left, batch):
            epoch += groups[label].pop(0)
            if not groups[label]:
                left.remove(label)
    return epoch


def made_up_index(folder: Path, size: Size = SIZES["vehicleid"]) -> str:
    """dataset.json and index.parquet with cameras, in pieces, and files of nothing but a hole for shards."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    identity = _images_of(size.train_identities, size.train_images, 0, rng)
    if others := size.identities - size.train_identities:
        test = _images_of(others, size.images - size.train_images, size.train_identities, rng)
        identity = np.concatenate([identity, test])
    with pq.ParquetWriter(folder / INDEX_FILE, index_schema(), compression="none") as writer:
        for start in range(0, size.images, PIECE_IMAGES):
            writer.write_table(_piece(size, start, identity[start : start + PIECE_IMAGES], rng))
    content = (folder / INDEX_FILE).read_bytes()
    names = sorted(shard_name("train", n) for n in range(-(-size.train_images // SHARD_IMAGES)))
    names += [shard_name("test", n) for n in range(size.train_images // SHARD_IMAGES, -(-size.images // SHARD_IMAGES))]
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(MOST_SHARD_BYTES)
    splits = {"train": {"images": size.train_images}, "test": {"images": size.images - size.train_images}}
    facts = {
        "format_version": FORMAT_VERSION,
        "name": "made-up",
        "noun": "vehicle",
        "cameras": 20,
        "views": 0,
        "splits": splits,
        "fingerprint": "made-up",
        "options": {},
        "files": {
            **{name: {"bytes": MOST_SHARD_BYTES} for name in names},
            INDEX_FILE: {"bytes": len(content), "crc32": zlib.crc32(content)},
        },
    }
    (folder / DATASET_FILE).write_text(json.dumps(facts))
    return str(folder)


def _piece(size: Size, start: int, identity: np.ndarray, rng: np.random.Generator) -> pa.Table:
    """The rows from `start` on, of which these are the identities."""
    row = np.arange(start, start + len(identity))
    train, num_bytes = row < size.train_images, rng.integers(10_000, 40_000, len(row))
    columns = {
        "split": np.where(train, "train", "test"),
        "shard": [shard_name("train" if n < size.train_images else "test", n // SHARD_IMAGES) for n in row.tolist()],
        "key": [f"image_{n:08d}" for n in row.tolist()],
        "offset": np.cumsum(num_bytes) - num_bytes,
        "size": num_bytes,
        "crc32": num_bytes.astype(np.uint32),
        "identity": [f"{number:07d}" for number in identity.tolist()],
        "label": np.where(train, identity, -1),
        "camera": rng.integers(0, 20, len(row)),
        "view": np.full(len(row), -1),
        "time": [""] * len(row),
        "lists": np.where(train, "", "800,1600,2400"),
        "width": np.full(len(row), 400),
        "height": np.full(len(row), 400),
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in index_schema()})


def _images_of(identities: int, images: int, first: int, rng: np.random.Generator) -> np.ndarray:
    """The identity of each image: at least one each, the others spread unevenly."""
    weights = rng.gamma(2.0, size=identities)
    counts = 1 + rng.multinomial(images - identities, weights / weights.sum())
    return first + np.repeat(np.arange(identities), counts)
