"""MSMT17, versions 1 and 2: people under 15 cameras, indoors and outdoors, on four days.

    MSMT17/ MSMT17_V1/ MSMT17_V2/ (or the root itself)
        train/ test/   or   mask_train_v2/ mask_test_v2/
            0000/0000_000_01_0303morning_0015_0.jpg = identity/identity_number_camera_time_...
        list_train.txt list_val.txt list_query.txt list_gallery.txt     lines `PATH LABEL`

The lists decide: a label is the identity. Test labels start at 0 again: identities are train/NNNN and test/NNNN.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shards.datasets.layout import image_files, match_names, require_listed
from shards.errors import DataError
from shards.records import ImageRecord
from shards.storage import Source, join

NAME = re.compile(r"\d{4}/\d{4}_\d{3,}_(?P<camera>0[1-9]|1[0-5])_(?P<time>\d{4}[a-z]+)_\d+_\d+(_ex)?\.jpg")
EXPECTED = "0000/0000_000_01_0303morning_0015_0.jpg, camera 01 to 15"
BASES = ("MSMT17", "MSMT17_V1", "MSMT17_V2", "")
FOLDERS = (("train", "test"), ("mask_train_v2", "mask_test_v2"))
"""Versions 1 and 2 of the training and the test folder."""
MAX_DIGITS = 9
"""Of a label."""


@dataclass(frozen=True)
class Msmt17:
    msmt17_val: str = "merge"
    """`merge` trains with the validation images too, as the paper did; `leave` leaves them out."""

    noun = "person"
    num_cameras = 15
    num_views = 0
    splits = ("train", "query", "gallery")

    @property
    def known_counts(self) -> dict[str, tuple[int, int]]:
        train = {"train": (32621, 1041)} if self.msmt17_val == "merge" else {}
        return train | {"query": (11659, 3060), "gallery": (82161, 3060)}

    def records(self, source: Source, warn: Callable[[str], None]) -> Iterator[ImageRecord]:
        base, train_folder, test_folder = find_folders(source)
        train_lists = ("list_train.txt", "list_val.txt") if self.msmt17_val == "merge" else ("list_train.txt",)
        parts = (
            ("train", train_folder, train_lists),
            ("query", test_folder, ("list_query.txt",)),
            ("gallery", test_folder, ("list_gallery.txt",)),
        )
        present = {folder: image_files(source, base + folder) for folder in (train_folder, test_folder)}
        for split, folder, lists in parts:
            labels: dict[str, int] = {}
            for list_name in lists:
                listed = read_list(source, base, folder, list_name, present[folder])
                if twice := sorted(labels.keys() & listed):
                    where = join(source.root, base + list_name)
                    raise DataError(f"{where}: {twice[0]} is listed twice, before in {lists[0]}")
                labels |= listed
            below = f"{base}{folder}/"
            for path, name in match_names(source, sorted(labels), NAME, EXPECTED, below=below):
                identity = f"{'train' if split == 'train' else 'test'}/{labels[path]:04d}"
                yield ImageRecord(path, identity, split, int(name["camera"]) - 1, time=name["time"])


def find_folders(source: Source) -> tuple[str, str, str]:
    """("BASE/" or "", training folder, test folder); raises DataError."""
    for name in BASES:
        base = f"{name}/" if name else ""
        for train, test in FOLDERS:
            if source.has(base + train) and source.has(base + test):
                return base, train, test
    raise DataError(
        f"{source.root}: not the expected layout; needs train/ and test/, or mask_train_v2/ and mask_test_v2/, "
        "there or below MSMT17/, MSMT17_V1/ or MSMT17_V2/"
    )


def read_list(source: Source, base: str, folder: str, list_name: str, present: list[str]) -> dict[str, int]:
    """Path below the root -> label; raises DataError on odd lines, repeated paths and images that are not there."""
    labels: dict[str, int] = {}
    for number, line in enumerate(source.read_text(base + list_name).splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        where = f"{join(source.root, base + list_name)}, line {number}"
        if not path or not label.isdecimal() or len(label) > MAX_DIGITS:
            raise DataError(f"{where}: expected `PATH LABEL`, got {line[:80]!r}")
        path = f"{base}{folder}/{path.strip()}"
        if path in labels:
            raise DataError(f"{where}: {path} is listed twice")
        labels[path] = int(label)
    require_listed(source, labels, present, base + list_name)
    return labels
