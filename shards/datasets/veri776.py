"""VeRi-776: vehicles under 20 cameras, from one of 8 sides (views come in files of their own).

    VeRi/ (or the root itself)
        image_train/ image_query/ image_test/   0002_c002_00030600_0.jpg = identity_camera_time_number
        name_train.txt name_query.txt name_test.txt
        train_label.xml test_label.xml          colour and type of each image

The folders decide what is packed; the name files tell whether a folder is complete.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from shards import storage
from shards.datasets.layout import find_base, image_files, match_names, require_listed
from shards.errors import DataError
from shards.records import ImageRecord
from shards.storage import Source

NAME = re.compile(r"(?P<identity>\d{4})_c0(?P<camera>0[1-9]|1\d|20)_(?P<time>\d+)_\d+\.jpg")
EXPECTED = "0002_c002_00030600_0.jpg, camera c001 to c020"
FOLDERS = {"train": "train", "query": "query", "gallery": "test"}
"""Our split -> theirs, in image_* and name_*.txt."""
NUM_VIEWS = 8
"""front, rear, left, left-front, left-rear, right, right-front, right-rear."""
LABEL = re.compile(r'<Item\s+imageName="([^"]+)"[^>]*?colorID="(\d+)"\s+typeID="(\d+)"')


@dataclass(frozen=True)
class Veri776:
    views: tuple[str, ...] = ()
    """Key-point files, each line `PATH x1 y1 ... x20 y20 VIEW`."""
    drop_unlabelled: bool = False
    """Leave out the images that have no view there, as the published numbers did."""

    noun = "vehicle"
    num_cameras = 20
    splits = ("train", "query", "gallery")

    @property
    def num_views(self) -> int:
        return NUM_VIEWS if self.views else 0

    @property
    def known_counts(self) -> dict[str, tuple[int, int]]:
        if self.drop_unlabelled:
            return {"train": (37715, 576), "query": (1677, 200), "gallery": (11578, 200)}
        return {"train": (37778, 576), "query": (1678, 200), "gallery": (11579, 200)}

    def records(self, source: Source, warn: Callable[[str], None]) -> Iterator[ImageRecord]:
        if self.drop_unlabelled and not self.views:
            raise DataError("--drop-unlabelled needs the view labels: give --views FILE")
        views, names_in = read_views(self.views)
        base = find_base(source, ["VeRi", ""], [f"image_{theirs}" for theirs in FOLDERS.values()])
        attributes = read_labels(source, base)
        names, without_view = set(), 0
        for split, theirs in FOLDERS.items():
            folder = f"{base}image_{theirs}"
            files = image_files(source, folder)
            check_list(source, files, folder, f"{base}name_{theirs}.txt", warn)
            for path, name in match_names(source, files, NAME, EXPECTED, below=f"{folder}/"):
                view = views.get(name[0], -1)
                names.add(name[0])
                if view < 0:
                    without_view += 1
                    if self.drop_unlabelled:
                        continue
                camera = int(name["camera"]) - 1
                yield ImageRecord(
                    path, name["identity"], split, camera, view, name["time"], attributes=attributes.get(name[0], ())
                )
        check_views(source, names_in, names, warn)
        if views and without_view:
            warn(f"{without_view} images without a view label " + ("left out" if self.drop_unlabelled else "kept"))


def read_views(files: tuple[str, ...]) -> tuple[dict[str, int], dict[str, set[str]]]:
    """(file name -> view 0-7, view file -> the names in it).

    Raises DataError on a line of another form and on two views for one name.
    """
    views: dict[str, int] = {}
    names_in: dict[str, set[str]] = {file: set() for file in files}
    for file in files:
        for number, line in enumerate(storage.read_text(file).splitlines(), 1):
            fields = line.rsplit(None, 41)
            if not fields:
                continue
            if len(fields) != 42 or not fields[-1].isdecimal() or int(fields[-1]) >= NUM_VIEWS:
                raise DataError(f"{file}, line {number}: expected PATH, 40 numbers and a view 0-7, got {line[:80]!r}")
            name = PurePosixPath(fields[0].replace("\\", "/")).name
            if views.setdefault(name, int(fields[-1])) != int(fields[-1]):
                raise DataError(f"{file}, line {number}: {name} has view {fields[-1]}, before it had {views[name]}")
            names_in[file].add(name)
    return views, names_in


def check_views(source: Source, names_in: dict[str, set[str]], names: set[str], warn: Callable[[str], None]) -> None:
    """Warn of view files that name none of the dataset's images; raise DataError when all are such."""
    unfit = [file for file, theirs in names_in.items() if not theirs & names]
    if unfit and len(unfit) == len(names_in):
        raise DataError(
            f"--views {', '.join(unfit)}: no image of {source.root} is named there; give this dataset's key-point files"
        )
    for file in unfit:
        warn(f"--views {file} names none of the images")


def read_labels(source: Source, base: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """File name -> colour and type number, of the label files that are there."""
    found: dict[str, tuple[tuple[str, str], ...]] = {}
    for name in ("train_label.xml", "test_label.xml"):
        if source.has(base + name):
            # declared gb2312, which XML parsers refuse; one flat list of items needs none
            text = source.read(base + name).decode("gb2312", errors="replace")
            found |= {image: (("color", color), ("type", kind)) for image, color, kind in LABEL.findall(text)}
    return found


def check_list(source: Source, files: list[str], folder: str, list_name: str, warn: Callable[[str], None]) -> None:
    """Compare a folder with its name file: a listed image that is missing is an error, the rest a warning."""
    if not source.has(list_name):
        warn(f"{list_name} is missing: cannot tell whether {folder} is complete")
        return
    listed = [f"{folder}/{line.strip()}" for line in source.read_text(list_name).splitlines() if line.strip()]
    require_listed(source, listed, files, list_name)
    if unlisted := len(set(files) - set(listed)):
        warn(f"{folder} holds {unlisted} images that {list_name} does not list; they are packed")
