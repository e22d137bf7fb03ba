"""Pack and verify a dataset of VehicleID's size, beside a plain loop over `tarfile`; then open and plan it.

    python launch/bench.py pack                   221,763 images of 26,267 identities, about 16 GB of temporary files
    python launch/bench.py pack --images 20000    the same on a smaller scale

Making the images is not counted. They are JPEGs of random patterns, about 30 kB each as a 400 x 400 crop is.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.benchmarks import sampler
from launch.cli import Parser, local_place, progress_bar
from launch.measure.memory import PeakMemory
from shards.loading.pk_sampler import PKSettings
from shards.records import ImageRecord

IMAGES, IDENTITIES, TRAIN_IMAGES, TRAIN_IDENTITIES = 221_763, 26_267, 113_346, 13_164
"""VehicleID's release and training list."""
TEST_LISTS = (800, 1600, 2400, 3200, 6000, 13164)
MIN_IMAGES = 4
SAMPLER_ROUNDS = 5
PATTERNS = 64
PACK = Path(__file__).resolve().parents[1] / "pack.py"


def run(arguments: list[str]) -> dict[str, Any]:
    """Seconds, images/s and peak memory of `pack.py build`, of `verify`, and of the plain loop.

    "index_and_sampler" is what `bench.py sampler` measures, on the dataset that was packed.
    """
    parser = Parser(prog="bench.py pack", description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES, help=f"default {IMAGES:,}")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=local_place, help="folder for the temporary files (default: the system's)")
    options = parser.parse_args(arguments)
    if options.images < MIN_IMAGES:
        parser.error(f"--images {options.images}: at least {MIN_IMAGES}, or there is nothing to train with")
    with tempfile.TemporaryDirectory(prefix="bench-pack-", dir=options.work) as folder:
        root, out = Path(folder) / "VehicleID_V1.0", Path(folder) / "shards"
        num_bytes = make_vehicleid(root, options.images)
        build = ("build", "--dataset", "vehicleid", "--root", root, "--out", out, "--processes", options.processes)
        built, again = timed(*build), timed(*build)
        verified = timed("verify", out, "--processes", options.processes)
        train_identities, _ = identity_counts(options.images)
        sampled = sampler.time_sampler(
            str(out), Path(folder) / "cache", PKSettings(min(16, train_identities), 4), SAMPLER_ROUNDS
        )
        shutil.rmtree(out)
        out.mkdir()
        plain_s = plain_loop(root, out)
    return {
        "images": options.images,
        "source_mb": round(num_bytes / 1e6),
        "processes": options.processes,
        "load_average": round(os.getloadavg()[0], 1),
        "build": built | {"images_per_s": round(options.images / built["seconds"])},
        "build_again": again,
        "verify": verified | {"images_per_s": round(options.images / verified["seconds"])},
        "index_and_sampler": sampled,
        "plain_tarfile_loop": {"seconds": round(plain_s, 1), "images_per_s": round(options.images / plain_s)},
        "speed_over_plain_loop": round(plain_s / built["seconds"], 2),
    }


def make_vehicleid(root: Path, images: int) -> int:
    """Write images and lists in VehicleID's layout and proportions; returns the bytes of the images."""
    patterns = [random_jpeg(seed) for seed in range(PATTERNS)]
    (root / "image").mkdir(parents=True)
    (root / "train_test_split").mkdir()
    train_images = images * TRAIN_IMAGES // IMAGES
    train_identities, tested_identities = identity_counts(images)
    lines: dict[str, list[str]] = {"train_list": [], **{f"test_list_{size}": [] for size in TEST_LISTS}}
    num_bytes = 0
    with progress_bar("making images") as progress:
        for number in range(images):
            data = numbered(patterns[number % PATTERNS], number)
            (root / "image" / f"{number:07d}.jpg").write_bytes(data)
            num_bytes += len(data)
            if number < train_images:
                lines["train_list"].append(f"{number:07d} {number % train_identities}\n")
            else:
                identity = number % tested_identities
                for size in TEST_LISTS:
                    if identity < size * tested_identities / TEST_LISTS[-1]:
                        lines[f"test_list_{size}"].append(f"{number:07d} {train_identities + identity}\n")
            if number % 1000 == 0:
                progress(number, images)
    for name, content in lines.items():
        (root / "train_test_split" / f"{name}.txt").write_text("".join(content))
    return num_bytes


def identity_counts(images: int) -> tuple[int, int]:
    """Training and test identities of a dataset of so many images, in VehicleID's proportions."""
    train, both = images * TRAIN_IDENTITIES // IMAGES, images * IDENTITIES // IMAGES
    return max(train, 1), max(both - train, 1)


def random_jpeg(seed: int) -> bytes:
    """A 400 x 400 JPEG of coarse and fine random patterns, 15 to 45 kB."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    patches = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    coarse = np.asarray(patches.resize((400, 400), Image.Resampling.BICUBIC))
    fine = rng.normal(0, 4 + seed % 8, (400, 400, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(coarse + fine, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def numbered(jpeg: bytes, number: int) -> bytes:
    """The same picture as another file: its number in a JPEG comment."""
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + jpeg[2:]


def timed(*arguments: object) -> dict[str, float]:
    """Run launch/pack.py; seconds, processor seconds and peak memory with all its processes."""
    os.sync()  # what was written before is not this command's to wait for
    before, started = os.times(), time.monotonic()
    process = subprocess.Popen([sys.executable, str(PACK), *map(str, arguments)], stdout=subprocess.DEVNULL)
    with PeakMemory(process.pid) as memory:
        process.wait()
    if process.returncode:
        raise RuntimeError(f"pack.py {arguments[0]} ended with exit code {process.returncode}")
    seconds, after = time.monotonic() - started, os.times()
    processor_s = sum(after[2:4]) - sum(before[2:4])  # user and system time of ended children
    peak_mb = round(memory.peak_bytes / 1e6)
    return {"seconds": round(seconds, 1), "processor_s": round(processor_s, 1), "peak_rss_mb": peak_mb}


def plain_loop(root: Path, out: Path, shard_bytes: int = 256 << 20) -> float:
    """Seconds of what one would write by hand: read, add to a tar with its JSON, one process, no checks."""
    from shards.datasets.vehicleid import VehicleId
    from shards.storage import Source

    records: list[ImageRecord] = list(VehicleId().records(Source(root), lambda line: None))
    os.sync()
    started, tar = time.monotonic(), tarfile.open(out / "0.tar", "w")  # noqa: SIM115
    for number, record in enumerate(sorted(records, key=lambda record: (record.split, record.identity, record.path))):
        if tar.offset > shard_bytes:
            tar.close()
            tar = tarfile.open(out / f"{number}.tar", "w")  # noqa: SIM115
        image = (root / record.path).read_bytes()
        facts = json.dumps({"identity": record.identity, "path": record.path}).encode()
        for name, data in ((Path(record.path).name, image), (Path(record.path).stem + ".json", facts)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    tar.close()
    return time.monotonic() - started
