"""VehicleID: vehicles from the front or the back, under many cameras, none of which is recorded.

    VehicleID_V1.0/ (or the root itself)
        image/0000001.jpg
        train_test_split/train_list.txt test_list_800.txt ...    lines `IMAGE IDENTITY`, image without .jpg
        attribute/model_attr.txt color_attr.txt                  lines `IDENTITY NUMBER`

There is no fixed query and gallery: all test images have split `test`, and `lists` says which test lists hold
them; the evaluation draws its galleries.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar

from shards.datasets.layout import find_base, image_files, require_listed
from shards.errors import DataError
from shards.records import ImageRecord
from shards.storage import Source, join

TEST_LIST = re.compile(r"test_list_(\d+)\.txt")
PUBLISHED_LISTS = {"800": "small", "1600": "medium", "2400": "large"}


@dataclass(frozen=True)
class VehicleId:
    noun = "vehicle"
    num_cameras = 0
    num_views = 0
    splits = ("train", "test")
    known_counts: ClassVar[dict[str, tuple[int, int]]] = {
        "train": (113346, 13164),
        "test list 800": (6493, 800),
        "test list 1600": (13377, 1600),
        "test list 2400": (19777, 2400),
    }

    def records(self, source: Source, warn: Callable[[str], None]) -> Iterator[ImageRecord]:
        base = find_base(source, ["VehicleID_V1.0", ""], ["image", "train_test_split"])
        present = set(image_files(source, f"{base}image"))
        attributes = read_attributes(source, base)
        for path, identity in read_list(source, base, "train_list.txt", present).items():
            yield ImageRecord(path, identity, "train", attributes=attributes.get(identity, ()))
        identities: dict[str, str] = {}
        holding: dict[str, list[str]] = {}
        for list_name in find_test_lists(source, base, warn):
            size = list_name.removeprefix("test_list_").removesuffix(".txt")
            for path, identity in read_list(source, base, list_name, present).items():
                if identities.setdefault(path, identity) != identity:
                    raise DataError(
                        f"{join(source.root, base)}train_test_split/{list_name}: {path} has identity {identity}, "
                        f"in another test list {identities[path]}"
                    )
                holding.setdefault(path, []).append(size)
        for path, identity in identities.items():
            known = attributes.get(identity, ())
            yield ImageRecord(path, identity, "test", lists=",".join(holding[path]), attributes=known)


def find_test_lists(source: Source, base: str, warn: Callable[[str], None]) -> list[str]:
    """The test lists that are there, smallest first; warns of a missing published one."""
    names = [PurePosixPath(path).name for path in source.files(f"{base}train_test_split")]
    found = sorted((name for name in names if TEST_LIST.fullmatch(name)), key=lambda name: (len(name), name))
    for size, word in PUBLISHED_LISTS.items():
        if f"test_list_{size}.txt" not in found:
            warn(f"{base}train_test_split/test_list_{size}.txt is missing: no {word} test")
    return found


def read_list(source: Source, base: str, list_name: str, present: set[str]) -> dict[str, str]:
    """Path below the root -> identity, in the list's order; raises DataError on odd lines and missing images."""
    list_path = f"{base}train_test_split/{list_name}"
    listed: dict[str, str] = {}
    for number, line in enumerate(source.read_text(list_path).splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        where = f"{join(source.root, list_path)}, line {number}"
        if len(fields) != 2 or not fields[0].removesuffix(".jpg").isdecimal() or not fields[1].isdecimal():
            raise DataError(f"{where}: expected `IMAGE IDENTITY`, got {line[:80]!r}")
        path = f"{base}image/{fields[0].removesuffix('.jpg')}.jpg"
        if path in listed:
            raise DataError(f"{where}: image {fields[0]} is listed twice")
        listed[path] = fields[1]
    require_listed(source, listed, present, list_path)
    return listed


def read_attributes(source: Source, base: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """Identity -> its colour and model number, of the attribute files that are there."""
    known: dict[str, tuple[tuple[str, str], ...]] = {}
    for attribute in ("color", "model"):
        path = f"{base}attribute/{attribute}_attr.txt"
        if not source.has(path):
            continue
        for number, line in enumerate(source.read_text(path).splitlines(), 1):
            fields = line.split()
            if len(fields) not in (0, 2):
                where = f"{join(source.root, path)}, line {number}"
                raise DataError(f"{where}: expected `IDENTITY NUMBER`, got {line[:80]!r}")
            if fields:
                known[fields[0]] = (*known.get(fields[0], ()), (attribute, fields[1]))
    return known
