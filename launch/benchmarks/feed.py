"""Images per second of training and extraction with the real loader, over the same with images at hand.

A packed dataset of JPEGs is made first. Training: steps of `launch/measure/loops.py`, eager, fed by PK batches of the
loader, beside steps on one batch that lies in memory. Extraction: `cluster/evaluation/features.py` from shards to
descriptors in memory, beside the encoder on images at hand. "loader_images_per_s" is what the loader gives alone.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from clipreid.augment import normalise
from clipreid.model.reid import ReIDModel, descriptor
from clipreid.model.spec import FeatureName
from clipreid.weights.initial import build_models
from cluster.evaluation.features import PassSettings, extract
from cluster.ranks.arithmetic import encoder_autocast
from cluster.ranks.team import Team
from cluster.settings.config import TrainSection
from launch.benchmarks.loader import write_images
from launch.cli import Parser, local_place, not_negative, positive
from launch.measure.loops import IDENTITIES, OurLoop
from launch.measure.published import AUGMENT, model_spec
from launch.measure.timing import choose_device, machine_facts, seconds
from shards.loading.index import ShardIndex
from shards.loading.pk_loader import PKBatch, PKLoader
from shards.loading.pk_sampler import PKSettings
from shards.packing.build import build
from shards.storage import write_json

EXAMPLE = """examples:
  python launch/bench.py feed
  python launch/bench.py feed --arch configs/models/small_vit.json --image-size 64x64 --batch 16 --loaders 1 --steps 3

The aim on a GPU with 8 cores beside it: "fed_over_ready" at least 0.95."""
PER_IDENTITY = 4
IMAGES_EACH = 8
DESCRIPTOR: tuple[FeatureName, ...] = ("img", "proj")
AHEAD = 8
"""Batches, more than a loader has ready."""


def run(arguments: list[str]) -> dict[str, Any]:
    options = _options(arguments)
    device = choose_device(options.device)
    spec = model_spec(options.arch, options.image_size, IDENTITIES)
    model, _, tables = build_models(spec)
    rows: list[dict[str, Any]] = []
    result = {
        "bench": "feed",
        **machine_facts(device),
        "arch": options.arch,
        "image_size": list(options.image_size),
        "jpeg": "x".join(map(str, options.jpeg)),
        "loaders": options.loaders,
        "rows": rows,
    }
    with tempfile.TemporaryDirectory(prefix="feed-bench-", dir=options.work) as folder:
        index = _make_dataset(Path(folder), options.jpeg, options.identities)
        for batch in options.batch:
            loop = OurLoop(model, tables, (batch, 3, *options.image_size), device, amp=device.type == "cuda")
            rows.append(training(loop, index, batch, options))
            del loop
            _keep(options, result)
        for batch in options.extract_batch:
            rows.append(extraction(model.to(device).eval(), index, batch, device, options))
            _keep(options, result)
    return result


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py feed", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--arch", default="ViT-B-16-quickgelu", help="open_clip model name or JSON file")
    parser.add_argument("--image-size", type=_size, default=(256, 128), metavar="HxW", help="of the network, pixels")
    parser.add_argument(
        "--jpeg", type=_size, default=(120, 300), metavar="WxH", help="of the images, pixels (default 120x300)"
    )
    parser.add_argument("--identities", type=positive, default=400, help="of 8 images each (default 400)")
    parser.add_argument("--batch", nargs="+", type=positive, default=[64, 256], help="images, multiples of 4")
    parser.add_argument("--extract-batch", nargs="+", type=positive, default=[256], help="images of a forward pass")
    parser.add_argument("--loaders", type=not_negative, default=8, help="decoding processes (default 8)")
    parser.add_argument("--steps", type=positive, default=60, help="steps of each kind that are timed")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--work", type=local_place, help="folder for the dataset (default: the system's temporary one)")
    parser.add_argument("--out", type=local_place, metavar="FILE", help="the result so far, written with every row")
    options = parser.parse_args(arguments)
    for batch in options.batch:
        if batch % PER_IDENTITY or not 2 <= batch // PER_IDENTITY <= options.identities:
            parser.error(f"--batch {batch} is not a multiple of 4, from 8 to 4 of each of the {options.identities}")
    if options.identities > IDENTITIES:
        parser.error(f"--identities {options.identities}: the model tells {IDENTITIES} apart")
    return options


def _size(text: str) -> tuple[int, int]:
    first, _, second = text.partition("x")
    if not (first.isdecimal() and second.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers of pixels, for example 256x128")
    return int(first), int(second)


def _keep(options: argparse.Namespace, result: dict[str, Any]) -> None:
    if options.out:
        write_json(str(options.out), result)


def _make_dataset(folder: Path, jpeg: tuple[int, int], identities: int) -> ShardIndex:
    write_images(folder / "images", jpeg, identities, IMAGES_EACH)
    build("manifest", [str(folder / "images" / "images.csv")], str(folder / "shards"))
    return ShardIndex.open(str(folder / "shards"), str(folder / "cache"))


def training(loop: OurLoop, index: ShardIndex, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Ready and fed in turn, three times, so that a slow minute hits both; the loader goes on meanwhile as in a run."""
    loader = PKLoader(
        index,
        settings=PKSettings(identities=batch // PER_IDENTITY, images_per_identity=PER_IDENTITY),
        image_size=options.image_size,
        rank=0,
        world_size=1,
        num_loaders=options.loaders,
        pin_memory=loop.device.type == "cuda",
    )
    try:
        batches, rounds = _endless(loader), 3
        steps = -(-options.steps // rounds)

        def fed() -> None:
            for one in itertools.islice(batches, steps):
                loop.take(one.images, one.labels, one.positions)

        def ready() -> None:
            for _ in range(steps):
                loop.step()

        def forget_ahead() -> None:
            """What the loader made while it had nothing to do."""
            for _ in itertools.islice(batches, AHEAD):
                pass

        ready()
        fed()
        ready_s = fed_s = 0.0
        for _ in range(rounds):
            ready_s += seconds(ready, loop.device)
            forget_ahead()
            fed_s += seconds(fed, loop.device)
        images = rounds * steps * batch
        start = time.perf_counter()
        alone = sum(len(one.images) for one in itertools.islice(batches, options.steps))
        loader_speed = alone / (time.perf_counter() - start)
    finally:
        loader.close()
    figures = {"ready_images_per_s": images / ready_s, "fed_images_per_s": images / fed_s}
    figures |= {"loader_images_per_s": loader_speed}
    return {"what": "training", "batch": batch, **_shown(figures)}


def _endless(loader: PKLoader) -> Iterator[PKBatch]:
    for epoch in itertools.count(1):
        yield from loader.epoch(epoch)


def extraction(
    model: ReIDModel, index: ShardIndex, batch: int, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Of all training images, with the settings of a run on this device."""
    train, team = TrainSection(), Team(device=device)

    def encode(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        pixels = normalise(images, AUGMENT.mean, AUGMENT.std)
        with encoder_autocast(train, device):
            return descriptor(model.features(pixels), DESCRIPTOR)

    settings = PassSettings(options.image_size, batch, num_loaders=options.loaders)
    images = torch.randint(0, 256, (batch, 3, *options.image_size), dtype=torch.uint8)
    if device.type == "cuda":
        images = images.pin_memory()
    count = len(index.split("train"))
    passes = -(-count // batch)

    @torch.no_grad()
    def ready() -> None:
        for _ in range(passes):
            encode(images.to(device, non_blocking=True), images).cpu()

    def fed() -> None:
        extract(encode, index, "train", team, settings)

    ready()
    figures = {
        "ready_images_per_s": passes * batch / seconds(ready, device),
        "fed_images_per_s": count / seconds(fed, device),
    }
    return {"what": "extraction", "batch": batch, **_shown(figures)}


def _shown(figures: dict[str, float]) -> dict[str, float]:
    ratio = figures["fed_images_per_s"] / figures["ready_images_per_s"]
    return {name: round(value, 1) for name, value in figures.items()} | {"fed_over_ready": round(ratio, 3)}
