"""Open the index of a dataset of VehicleID's size and plan epochs of PK batches, beside the usual Python loop.

python launch/bench.py sampler                  a made-up index of VehicleID's counts
python launch/bench.py sampler --shards URL     a packed dataset
"""

import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from launch.cli import Parser, place
from shards.errors import DataError
from shards.format import DATASET_FILE, FORMAT_VERSION, INDEX_FILE, index_schema
from shards.loading.index import ShardIndex, SplitIndex
from shards.loading.pk_sampler import STRATEGIES, PKSettings, epoch_plan

IMAGES, TRAIN_IMAGES, TRAIN_IDENTITIES, IDENTITIES = 221_763, 113_346, 13_164, 26_267
SHARD_IMAGES = 8000
VIRTUAL_NODES = 4


def run(arguments: list[str]) -> dict[str, Any]:
    """Median seconds to open the index and to plan an epoch, of each strategy and of the plain loop."""
    parser = Parser(prog="bench.py sampler", description=__doc__)
    parser.add_argument(
        "--shards", type=place, help="a packed dataset, folder or URL (default: an index of VehicleID's size)"
    )
    parser.add_argument("--identities", type=int, default=16, help="P (default 16)")
    parser.add_argument("--images-per-identity", type=int, default=4, help="K (default 4)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-sampler-") as folder:
        url, cache = options.shards or made_up_index(Path(folder) / "shards"), Path(folder) / "cache"
        return time_sampler(url, cache, options.identities, options.images_per_identity, options.rounds)


def time_sampler(url: str, cache: Path, identities: int, images_per_identity: int, rounds: int) -> dict[str, Any]:
    """Open the index of a packed dataset and plan its epochs. cache: a folder that may be deleted.

    Raises DataError where the dataset has too few training identities for a batch.
    """
    opened = {"first_on_the_node": median(lambda: open_anew(url, cache), rounds)}
    opened["after_that"] = median(lambda: open_index(url, cache), rounds)
    index = ShardIndex.open(url, str(cache))
    train = index.split("train")
    settings = PKSettings(identities, images_per_identity)
    plans = {name: plan_seconds(train, replace(settings, strategy=name), rounds) for name in STRATEGIES}
    plans[f"identity, {VIRTUAL_NODES} virtual nodes"] = plan_seconds(
        train, replace(settings, virtual_nodes=VIRTUAL_NODES), rounds
    )
    plain_s = median(lambda: plain_epoch(train.labels, identities, images_per_identity, 0), 1)
    return {
        "index_images": index.table.num_rows,
        "train_images": len(train),
        "train_identities": train.num_identities,
        "identities_per_batch": identities,
        "steps_per_epoch": len(epoch_plan(train, settings, 1)),
        "load_average": round(os.getloadavg()[0], 1),
        "open_index_s": opened,
        "plan_epoch_s": plans,
        "plain_loop_s": plain_s,
        "speed_over_plain_loop": round(plain_s / plans["identity"], 1) if plans["identity"] else None,
    }


def median(work: Callable[[], object], rounds: int) -> float:
    durations = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        durations.append(time.perf_counter() - start)
    return round(statistics.median(durations), 4)


def open_index(url: str, cache: Path) -> None:
    train = ShardIndex.open(url, str(cache)).split("train")
    assert len(train.labels) == len(train.identity_codes) == len(train.shard)


def open_anew(url: str, cache: Path) -> None:
    shutil.rmtree(cache, ignore_errors=True)
    open_index(url, cache)


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


def made_up_index(folder: Path) -> str:
    """dataset.json and index.parquet like VehicleID's, with cameras, and files of nothing but a hole for shards."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    identity = np.concatenate(
        [
            _images_of(TRAIN_IDENTITIES, TRAIN_IMAGES, 0, rng),
            _images_of(IDENTITIES - TRAIN_IDENTITIES, IMAGES - TRAIN_IMAGES, TRAIN_IDENTITIES, rng),
        ]
    )
    train = np.arange(IMAGES) < TRAIN_IMAGES
    shard = np.where(train, 0, 1000) + np.arange(IMAGES) // SHARD_IMAGES
    size = rng.integers(10_000, 40_000, IMAGES)
    shard_names = [f"{'train' if number < 1000 else 'test'}-{number % 1000:06d}.tar" for number in shard.tolist()]
    columns = {
        "split": np.where(train, "train", "test"),
        "shard": shard_names,
        "key": [f"image_{number:07d}" for number in range(IMAGES)],
        "offset": np.cumsum(size) - size,
        "size": size,
        "crc32": size.astype(np.uint32),
        "identity": [f"{number:05d}" for number in identity.tolist()],
        "label": np.where(train, identity, -1),
        "camera": rng.integers(0, 20, IMAGES),
        "view": np.full(IMAGES, -1),
        "time": [""] * IMAGES,
        "lists": np.where(train, "", "800,1600,2400"),
        "width": np.full(IMAGES, 400),
        "height": np.full(IMAGES, 400),
    }
    table = pa.table({field.name: pa.array(columns[field.name], field.type) for field in index_schema()})
    pq.write_table(table, folder / INDEX_FILE, compression="none")
    names, shard_bytes = sorted(set(shard_names)), int(size.sum())
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(shard_bytes)
    facts = {
        "format_version": FORMAT_VERSION,
        "name": "made-up",
        "noun": "vehicle",
        "cameras": 20,
        "views": 0,
        "splits": {"train": {"images": TRAIN_IMAGES}, "test": {"images": IMAGES - TRAIN_IMAGES}},
        "fingerprint": "made-up",
        "options": {},
        "files": {name: {"bytes": shard_bytes} for name in names},
    }
    (folder / DATASET_FILE).write_text(json.dumps(facts))
    return str(folder)


def _images_of(identities: int, images: int, first: int, rng: np.random.Generator) -> np.ndarray:
    """The identity of each image: at least one each, the others spread unevenly."""
    weights = rng.gamma(2.0, size=identities)
    counts = 1 + rng.multinomial(images - identities, weights / weights.sum())
    return first + np.repeat(np.arange(identities), counts)
