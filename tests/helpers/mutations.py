"""Files as accidents and strangers leave them, and what reading each of them comes to.

    a good file ── seeded mutators ──▶ [mutations] ──▶ reader ──▶ read right, refused in one line, or a failure

    python -m tests.helpers.mutations COUNT SEED      prints {class: {"read": …, "refused": …}, …} as JSON

A process of its own, so that a crash is seen as one. The bounds: LIMIT_S seconds a file, LIMIT_MB of memory.
"""

import json
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np

from tests.helpers.memory import peak_memory_mb
from tests.helpers.shards import picture, write_shards

LIMIT_S = 20
LIMIT_MB = 2048
"""Of the whole process, with torch and all that was read before."""
ODD = (
    "-1",
    "1e400",
    "99999999999999999999",
    "null",
    "true",
    '""',
    "[]",
    "{}",
    "\0",
    "x" * 5000,
    "\ud800",
    "../../x",
    "NaN",
)
NUMBER = re.compile(rb"-?\d+(\.\d+)?")


# --- mutators: (bytes, dice) -> bytes


def flip(data, dice):
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 8, 64))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def cut(data, dice):
    return data[: dice.randrange(len(data))]


def zero(data, dice):
    start, stop = part(data, dice)
    return data[:start] + bytes(stop - start) + data[stop:]


def double(data, dice):
    start, stop = part(data, dice)
    return data[:stop] + data[start:stop] * dice.choice((1, 3)) + data[stop:]


def leave_out(data, dice):
    start, stop = part(data, dice)
    return data[:start] + data[stop:]


def swap(data, dice):
    start, stop = part(data, dice)
    return data[stop:] + data[start:stop] + data[:start]


def noise(data, dice):
    start, stop = part(data, dice)
    return data[:start] + dice.randbytes(stop - start) + data[stop:]


def odd_number(data, dice):
    """Another value in place of a number that is written out."""
    found = list(NUMBER.finditer(data))
    if not found:
        return flip(data, dice)
    place = dice.choice(found)
    return data[: place.start()] + dice.choice(ODD).encode(errors="surrogatepass") + data[place.end() :]


def odd_word(data, dice):
    found = list(re.finditer(rb"[A-Za-z_.]{3,}", data))
    place = dice.choice(found) if found else re.match(b"", data)
    return data[: place.start()] + dice.choice(ODD).encode(errors="surrogatepass") + data[place.end() :]


def nested(data, dice):
    return dice.choice((b"[", b'{"a":', b"- ", b"(")) * dice.choice((50, 5000, 100_000)) + data


def other_file(data, dice):
    return dice.choice(
        (b"", bytes(4096), b"<html>", b"\x1f\x8b" + data, b"PK\3\4" + data, "配置\n".encode("utf-16"), b"[]", b"7")
    )


def part(data, dice):
    start = dice.randrange(len(data))
    return start, min(len(data), start + dice.choice((1, 16, 512, 4096)))


BINARY = (flip, flip, cut, zero, double, leave_out, swap, noise, other_file)
TEXT = (*BINARY, odd_number, odd_number, odd_word, odd_word, nested)


# --- classes: a folder of good files, the one that is mutated, and how it is read. A wrong result is an AssertionError.


class Tars:
    mutators = (*BINARY, odd_number)

    def __init__(self, folder):
        self.url = write_shards(folder / "s", {"train": {"a": 3, "b": 2}, "query": {"c": 2}})
        self.targets = sorted((folder / "s").glob("*.tar"))
        self.cache = str(folder / "cache")
        self.right = self.pixels()

    def pixels(self):
        from shards.loading.index import ShardIndex
        from shards.loading.tar_images import TarImages

        index, found = ShardIndex.open(self.url, self.cache), []
        for split in index.split_names:
            images = TarImages(index, split, (16, 8))
            found.append(np.zeros((len(images), 3, 16, 8), np.uint8))
            images.read_into(found[-1], 0, len(images))
        return np.concatenate(found)

    def read(self):
        from shards.packing.verify import verify

        report = verify(self.url, processes=1)
        assert all("\n" not in str(problem) for problem in report.problems), report.problems
        assert np.array_equal(self.pixels(), self.right), "other pixels"


class Index(Tars):
    """Of a dataset that lists no checksums: an index has to speak for itself."""

    mutators = BINARY

    def __init__(self, folder):
        super().__init__(folder)
        place = Path(self.url) / "dataset.json"
        place.write_text(json.dumps(json.loads(place.read_text()) | {"files": {}}))
        self.targets = [Path(self.url) / "index.parquet"]


class DatasetFile(Tars):
    mutators = TEXT

    def __init__(self, folder):
        super().__init__(folder)
        self.targets = [Path(self.url) / "dataset.json"]


class Tables:
    mutators = TEXT

    def __init__(self, folder):
        import pyarrow.csv
        import pyarrow.parquet

        self.targets = [folder / "t.csv", folder / "t.parquet"]
        rows = [f"a/{n}.jpg,id{n % 3},{('train', 'query', 'gallery')[n % 3]},{n % 4},,{n}" for n in range(12)]
        self.targets[0].write_text("\n".join(["path,identity,split,camera,view,time", *rows]) + "\n")
        pyarrow.parquet.write_table(pyarrow.csv.read_csv(self.targets[0]).select(range(4)), self.targets[1])

    def read(self):
        from shards.datasets.manifest import Manifest
        from shards.storage import Source

        for target in self.targets:
            for record in Manifest(str(target)).records(Source(str(target.parent)), print):
                assert len(record.path) < 4096 and record.split in Manifest.splits and record.camera < 10_000


class Settings:
    mutators = TEXT

    def __init__(self, folder):
        self.targets = [folder / "c.yaml"]
        self.targets[0].write_text(
            "# what runs have\nrun: {dir: runs/a, seed: 3}\ndata:\n  shards: data/x\n  pixel_std: [0.5, 0.5, 0.5]\n"
            "model: {arch: ViT-B-16, image_size: 256x128, stride: null}\nstage2:\n  lr: 5e-6\n  milestones: 30,50\n"
            "eval: {rerank: [20, 6, 0.3], flip: yes}\ncluster:\n  workers: {min: 1, max: 4}\n  timeout_s: 90\n"
        )

    def read(self):
        from cluster.settings.paths import with_absolute_paths
        from cluster.settings.yaml_file import dump_config, load_config, parse_config, parse_tree

        config = with_absolute_paths(load_config(self.targets[0]))
        assert parse_config(parse_tree(dump_config(config), "dumped")) == config


class Images:
    mutators = (*BINARY, odd_number)

    def __init__(self, folder):
        from PIL import Image

        (folder / "i").mkdir()
        self.targets = [folder / "i" / f"a.{kind}" for kind in ("jpg", "png", "webp", "bmp", "gif", "tif", "ppm")]
        (folder / "first.png").write_bytes(picture(1, kind="png"))
        for target in self.targets:
            Image.open(folder / "first.png").save(target)

    def read(self):
        from shards.loading.folder_images import FolderImages

        names = [target.name for target in self.targets]
        images = FolderImages(str(self.targets[0].parent), names, (16, 8))
        images.read_into(np.zeros((len(names), 3, 16, 8), np.uint8), 0, len(names))


class Weights:
    """Ours, in both of our formats and the authors'."""

    mutators = (*BINARY, odd_number, odd_word)

    def __init__(self, folder):
        from clipreid.weights.card import ModelCard
        from clipreid.weights.file import save_model
        from clipreid.weights.initial import build_models
        from clipreid.weights.official import save_official
        from tests.helpers.settings import model_spec

        root = Path(__file__).resolve().parents[2]
        arch = str(root / "configs" / "models" / "tiny_vit.json")
        self.spec = model_spec(arch, image_size=(48, 32), identities=5, noun="vehicle")
        models = build_models(self.spec)
        self.targets = [folder / "model.safetensors", folder / "official.pth"]
        save_model(self.targets[0], models, ModelCard(self.spec, (0.5,) * 3, (0.5,) * 3, ("img",)))
        save_official(self.targets[1], models.state_dict(), self.spec)
        self.right = models.state_dict()

    def read(self):
        from clipreid.weights.file import load_models
        from clipreid.weights.initial import build_models

        for found in (load_models(self.targets[0]), build_models(self.spec, str(self.targets[1]))):
            state = found.state_dict()
            assert state.keys() == self.right.keys() or found.text is None, "other names"
            assert all(value.equal(self.right[name]) for name, value in state.items()), "other weights"


class Features:
    mutators = (*BINARY, odd_number, odd_word)

    def __init__(self, folder):
        from cluster.evaluation.feature_file import write_features

        arrays = {
            "features": np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32),
            "identities": np.array([f"id{n % 7}" for n in range(40)]),
            "cameras": np.arange(40) % 3,
        }
        self.right = arrays
        for path in (folder / "f.npz", folder / "f.parquet"):
            write_features(path, arrays)
        np.savez_compressed(folder / "c.npz", **arrays)
        self.sets = [str(folder / name) for name in ("f.npz", "f.parquet", "c.npz")]
        self.targets = [folder / "f.npz", folder / "c.npz", *(folder / "f.parquet").iterdir()]

    def read(self):
        from cluster.evaluation.feature_file import read_pair

        for path in self.sets:
            for found in read_pair([path, path], "camera"):
                assert all(np.array_equal(getattr(found, name), values) for name, values in self.right.items()), (
                    "others"
                )


CLASSES = {
    "tars": Tars,
    "indexes": Index,
    "dataset.json": DatasetFile,
    "tables": Tables,
    "settings": Settings,
    "images": Images,
    "weights": Weights,
    "features": Features,
}


def outcome_of(read):
    """ "read" or "refused"; a failure in words where it was neither in time and in one line."""
    from launch.cli import user_mistake

    start = time.monotonic()
    signal.alarm(LIMIT_S)
    try:
        read()
        outcome = "read"
    except Exception as error:
        message = user_mistake(error)
        one_line = message and len(message) < 2000 and ("\n" not in message or _is_a_line_each(error))
        outcome = "refused" if one_line else "".join(traceback.format_exception(error))[-1500:]
    finally:
        signal.alarm(0)
    return outcome if time.monotonic() - start < LIMIT_S else f"took {time.monotonic() - start:.0f} s"


def _is_a_line_each(error):
    """Settings tell all their faults at once, each in a line that begins with its key."""
    lines = str(error).splitlines()
    return type(error).__name__ == "ConfigError" and all(re.match(r"\S+: ", line) for line in lines)


def try_class(name, count, seed):
    """Counts of outcomes, and each failure with what repeats it."""
    counts, failures = Counter(), []
    with tempfile.TemporaryDirectory() as place:
        case = CLASSES[name](Path(place))
        good = {target: target.read_bytes() for target in case.targets}
        assert outcome_of(case.read) == "read", outcome_of(case.read)
        for number in range(count):
            dice = random.Random(f"{name} {seed} {number}")
            target, mutate = dice.choice(case.targets), dice.choice(case.mutators)
            target.write_bytes(mutate(good[target], dice))
            outcome = outcome_of(case.read)
            target.write_bytes(good[target])
            if outcome not in ("read", "refused"):
                failures.append(f"{name} {number} (seed {seed}): {mutate.__name__} of {target.name}: {outcome}")
                outcome = "failed"
            counts[outcome] += 1
    return counts, failures


def hang(*_):
    raise AssertionError(f"no end within {LIMIT_S} s")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, hang)
    count, seed, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(CLASSES)
    result, failures = {}, []
    for name in names:
        print(name, end=" ", file=sys.stderr, flush=True)
        result[name], failed = try_class(name, count, seed)
        failures += failed
    peak_mb = peak_memory_mb()
    print(json.dumps({"counts": result, "failures": failures, "peak_mb": peak_mb}))
