"""The demo dataset: vehicles drawn by number, laid out on disk as a real dataset is.

    looks ──▶ vehicle ──▶ scene ──▶ [demo dataset: folder of JPEGs, lists, labels] ──▶ datasets ──▶ build
                            └──▶ captions ──┘

The folder looks like VeRi-776 (or VehicleID) to its parser, so everything after it is the real thing. The first
half of the identities is for training, the other half for testing. Every image is a pure function of (seed,
identity, its number): neither the number of processes nor the number of other identities changes it. Captions are a
table beside the images, which no parser reads.
"""

import csv
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shards.demo.captions import describe
from shards.demo.looks import COLOURS, SHAPES, draw_looks
from shards.demo.scene import get_camera, take_photo
from shards.demo.vehicle import build_vehicle
from shards.errors import DataError
from shards.progress import Progress, silent
from shards.storage import naming

Drawn = TypeVar("Drawn")
LAYOUTS = ("veri776", "vehicleid")
SETTINGS_FILE = "render.json"
CAPTIONS_FILE = "captions.csv"
_DRAWING = 1
"""Raise it when the pictures change, so that a folder of old pictures is not taken for one of today's."""
_TEST_LISTS = (800, 1600, 2400, 3200, 6000, 13164)


@dataclass(frozen=True, slots=True)
class RenderSettings:
    """All that decides the pictures."""

    identities: int
    cameras: int
    images: int  # of each identity, over all cameras
    layout: str
    seed: int
    captions: bool = False
    drawing: int = _DRAWING

    def check(self) -> None:
        """Raise DataError for numbers that the layout cannot hold or that cannot be evaluated."""
        veri = self.layout == "veri776"
        limits = {
            "identities": (2, 9999 if veri else 99999, "half of them are for training, half for testing"),
            "cameras": (2, 20 if veri else 999, "a query needs a match under another camera"),
            "images": (2, 99, "images of each identity"),
            "seed": (0, 2**63, "a number"),
        }
        if self.layout not in LAYOUTS:
            raise DataError(f"layout is {self.layout!r}; known: {', '.join(LAYOUTS)}")
        for name, (low, high, why) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise DataError(
                    f"{name} is {getattr(self, name)}, must be {low} to {high} in layout {self.layout} ({why})"
                )

    def as_written(self) -> dict[str, Any]:
        """As SETTINGS_FILE has them; `captions` only where there are any, as before there were any."""
        return {name: value for name, value in asdict(self).items() if name != "captions" or value}

    @property
    def first_test_identity(self) -> int:
        """Identities count from 1; those below this one are for training."""
        return self.identities - self.identities // 2 + 1


@dataclass(frozen=True, slots=True)
class RenderedImage:
    """What the lists say about one picture."""

    identity: int
    number: int  # within its identity, from 0
    camera: int  # 0-based
    time: int
    view: int  # VeRi-776's number, 0-7
    keypoints: tuple[int, ...]  # x1 y1 ... x20 y20, -1 where not seen
    colour: int  # VeRi-776's numbers, 1-based
    shape: int
    caption: str

    @property
    def veri_name(self) -> str:
        return f"{self.identity:04d}_c{self.camera + 1:03d}_{self.time:08d}_0.jpg"


def render_dataset(
    out: Path,
    *,
    identities: int,
    cameras: int,
    images: int,
    layout: str = "veri776",
    seed: int = 0,
    captions: bool = False,
    processes: int | None = None,
    progress: Progress = silent,
) -> bool:
    """Draw a dataset of identities x images JPEGs into the folder `out`; with `captions` also a table of those.

    The folder appears under its name only when complete. One that is there with the same settings is kept as it
    is. `processes` is the number of drawing processes; None takes all cores that this process may use.
    Returns True when it drew, False when it kept what is there. Raises DataError for impossible settings and
    for a folder that holds anything else.
    """
    settings = RenderSettings(identities, cameras, images, layout, seed, captions)
    settings.check()
    out = Path(out).absolute()
    if _is_there(out, settings):
        return False
    partial_out = out.with_name(f".{out.name}.partial")  # left behind by a render that was stopped, or absent
    try:
        shutil.rmtree(partial_out, ignore_errors=True)
        partial_out.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    write_image, write_lists, paths_of = _WRITERS[layout]
    for folder in _FOLDERS[layout]:
        (partial_out / folder).mkdir()
    draw = partial(_draw_identity, partial_out, settings, write_image)
    rendered: list[RenderedImage] = []
    for own in in_processes(draw, range(1, identities + 1), processes):
        rendered += own
        progress(len(rendered), identities * images)
    write_lists(partial_out, settings, rendered)
    if captions:
        _write_captions(partial_out, {path: i.caption for i in rendered for path in paths_of(settings, i)})
    (partial_out / SETTINGS_FILE).write_text(json.dumps(settings.as_written(), indent=1) + "\n")
    partial_out.replace(out)
    return True


def _is_there(out: Path, settings: RenderSettings) -> bool:
    """Whether `out` holds this very dataset; DataError if it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        raise DataError(f"{out}: exists and was not rendered here; give another --out") from None
    wanted = settings.as_written()
    if found != wanted:
        keys = dict.fromkeys([*wanted, *found])
        differing = [f"{k} {found.get(k)} not {wanted.get(k)}" for k in keys if found.get(k) != wanted.get(k)]
        raise DataError(
            f"{out}: rendered with other settings ({', '.join(differing)}); remove it or give another --out"
        )
    return True


# --- drawing --------------------------------------------------------------------------------------------------


def _draw_identity(folder: Path, settings: RenderSettings, write_image: Callable, identity: int) -> list[RenderedImage]:
    """Draw and write all images of one identity; they go round the cameras."""
    seed = settings.seed
    looks = draw_looks(seed, identity)
    model = build_vehicle(looks)
    first_camera = identity * 7 % settings.cameras
    rendered = []
    for number in range(settings.images):
        camera = (first_camera + number) % settings.cameras
        photo = take_photo(model, get_camera(seed, camera), np.random.default_rng((seed, 4, identity, number)))
        arrival = int(np.random.default_rng((seed, 5, identity, camera)).integers(80_000))
        image = RenderedImage(
            identity=identity,
            number=number,
            camera=camera,
            time=arrival + 15 * (number // settings.cameras),
            view=photo.view,
            keypoints=tuple(photo.keypoints.ravel().tolist()),
            colour=list(COLOURS).index(looks.colour) + 1,
            shape=list(SHAPES).index(looks.shape) + 1,
            caption=describe(looks, photo.sight, np.random.default_rng((seed, 6, identity, number))),
        )
        with naming(folder):
            write_image(folder, settings, image, partial(photo.image.save, quality=photo.quality))
        rendered.append(image)
    return rendered


def in_processes(draw: Callable[[int], Drawn], identities: range, processes: int | None) -> Iterator[Drawn]:
    """draw(identity) for each, in order, on all cores that this process may use where `processes` is None."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(processes or cores, len(identities))
    if processes == 1:
        yield from map(draw, identities)
        return
    # spawn: a fork of a process that runs threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(draw, identities)


def _write_captions(folder: Path, captions: dict[str, str]) -> None:
    """A table of the columns path and caption, a row an image file, sorted by path."""
    with (folder / CAPTIONS_FILE).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([("path", "caption"), *sorted(captions.items())])


# --- VeRi-776's layout ----------------------------------------------------------------------------------------


def _veri_splits(settings: RenderSettings, image: RenderedImage) -> tuple[str, ...]:
    """One query of each test identity and camera; as in the original, queries are in the gallery too."""
    if image.identity < settings.first_test_identity:
        return ("train",)
    return ("test", "query") if image.number < settings.cameras else ("test",)


def _veri_paths(settings: RenderSettings, image: RenderedImage) -> list[str]:
    return [f"image_{split}/{image.veri_name}" for split in _veri_splits(settings, image)]


def _write_veri_image(folder: Path, settings: RenderSettings, image: RenderedImage, save: Callable) -> None:
    first, *copies = (folder / path for path in _veri_paths(settings, image))
    save(first)
    for copy in copies:
        shutil.copyfile(first, copy)


def _write_veri_lists(folder: Path, settings: RenderSettings, images: list[RenderedImage]) -> None:
    images = sorted(images, key=lambda image: image.veri_name)
    of = {s: [i for i in images if s in _veri_splits(settings, i)] for s in ("train", "query", "test")}
    for split, listed in of.items():
        (folder / f"name_{split}.txt").write_text("".join(f"{i.veri_name}\n" for i in listed))
    for split, root in (("train", "TrainingImages"), ("test", "TestImages")):
        items = [
            f'    <Item imageName="{i.veri_name}" vehicleID="{i.identity:04d}" cameraID="c{i.camera + 1:03d}" '
            f'colorID="{i.colour}" typeID="{i.shape}" />\n'
            for i in of[split]
        ]
        head = f'<?xml version="1.0" encoding="gb2312"?>\n<{root} Version="1.0">\n  <Items number="{len(items)}">\n'
        text = head + "".join(items) + f"  </Items>\n</{root}>\n"
        (folder / f"{split}_label.xml").write_text(text, encoding="gb2312")
    for name, splits in (("train", ("train",)), ("test", ("query", "test"))):
        lines = [
            f"image_{split}/{i.veri_name} {' '.join(map(str, i.keypoints))} {i.view}\n"
            for split in splits
            for i in of[split]
        ]
        (folder / f"keypoint_{name}.txt").write_text("".join(lines))


# --- VehicleID's layout ---------------------------------------------------------------------------------------


def _vehicleid_name(settings: RenderSettings, image: RenderedImage) -> str:
    return f"{(image.identity - 1) * settings.images + image.number + 1:07d}"


def _vehicleid_paths(settings: RenderSettings, image: RenderedImage) -> list[str]:
    return [f"image/{_vehicleid_name(settings, image)}.jpg"]


def _write_vehicleid_image(folder: Path, settings: RenderSettings, image: RenderedImage, save: Callable) -> None:
    (path,) = _vehicleid_paths(settings, image)
    save(folder / path)


def _write_vehicleid_lists(folder: Path, settings: RenderSettings, images: list[RenderedImage]) -> None:
    """Train list; test lists under the published names, with a third, two thirds and all where there are fewer."""
    first, count = settings.first_test_identity, settings.identities // 2
    least = {name: max(1, part * count // 3) for part, name in enumerate(_TEST_LISTS[:3], start=1)}
    sizes = {name: min(name, count) for name in _TEST_LISTS if name <= count or name in least}
    sizes |= {name: size for name, size in least.items() if name > count}
    chosen = {f"test_list_{name}": range(first, first + size) for name, size in sizes.items()}
    chosen["train_list"] = range(1, first)
    lines = {image: f"{_vehicleid_name(settings, image)} {image.identity}\n" for image in images}
    for name, identities in chosen.items():
        text = "".join(line for image, line in lines.items() if image.identity in identities)
        (folder / "train_test_split" / f"{name}.txt").write_text(text)
    attribute = folder / "attribute"
    (attribute / "img2vid.txt").write_text("".join(lines.values()))
    one_each = {image.identity: image for image in images}.values()
    (attribute / "color_attr.txt").write_text("".join(f"{i.identity} {i.colour - 1}\n" for i in one_each))
    (attribute / "model_attr.txt").write_text("".join(f"{i.identity} {i.shape - 1}\n" for i in one_each))


_FOLDERS = {
    "veri776": ("image_train", "image_query", "image_test"),
    "vehicleid": ("image", "train_test_split", "attribute"),
}
_WRITERS = {
    "veri776": (_write_veri_image, _write_veri_lists, _veri_paths),
    "vehicleid": (_write_vehicleid_image, _write_vehicleid_lists, _vehicleid_paths),
}
