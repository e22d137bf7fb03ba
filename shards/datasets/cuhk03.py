"""CUHK03, new protocol: 767 identities to train with, 700 to test with, boxes detected or drawn by hand.

    cuhk03-np/ (or the root itself)
        detected/ labeled/
            bounding_box_train/ query/ bounding_box_test/   0003_c1_1.png = identity_camera_number

The images of one of the two kinds of boxes; those of the other show the same people.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shards.datasets.layout import find_base, image_files, match_names
from shards.errors import DataError
from shards.records import ImageRecord
from shards.storage import Source

NAME = re.compile(r"(?P<identity>\d{4})_c(?P<camera>[12])_\d+\.(?:png|jpg)")
EXPECTED = "0003_c1_1.png, camera c1 or c2"
FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
KNOWN_COUNTS = {
    "detected": {"train": (7365, 767), "query": (1400, 700), "gallery": (5332, 700)},
    "labelled": {"train": (7368, 767), "query": (1400, 700), "gallery": (5328, 700)},
}
BOXES = {"detected": ("detected",), "labelled": ("labeled", "labelled")}


@dataclass(frozen=True)
class Cuhk03:
    boxes: str = "detected"
    """detected or labelled."""

    noun = "person"
    num_cameras = 2
    num_views = 0
    splits = ("train", "query", "gallery")

    @property
    def known_counts(self) -> dict[str, tuple[int, int]]:
        return KNOWN_COUNTS.get(self.boxes, {})

    def records(self, source: Source, warn: Callable[[str], None]) -> Iterator[ImageRecord]:
        if self.boxes not in BOXES:
            raise DataError(f"--boxes {self.boxes}: is none of {', '.join(BOXES)}")
        places = [f"{above}{name}" for above in ("", "cuhk03-np/", "cuhk03/") for name in BOXES[self.boxes]]
        base = find_base(source, places, FOLDERS.values())
        for split, theirs in FOLDERS.items():
            folder = f"{base}{theirs}"
            for path, name in match_names(source, image_files(source, folder), NAME, EXPECTED, below=f"{folder}/"):
                yield ImageRecord(path, name["identity"], split, int(name["camera"]) - 1)
