"""DukeMTMC-reID: people under 8 cameras.

    DukeMTMC-reID/ (also below dukemtmcreid/, or the root itself)
        bounding_box_train/ query/ bounding_box_test/   0001_c2_f0046182.jpg = identity_camera_frame

All that is known of an image is in its name.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from shards.datasets.layout import find_base, image_files, match_names
from shards.records import ImageRecord
from shards.storage import Source

NAME = re.compile(r"(?P<identity>\d{4})_c(?P<camera>[1-8])_f(?P<time>\d+)\.jpg")
EXPECTED = "0001_c2_f0046182.jpg, camera c1 to c8"
FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


@dataclass(frozen=True)
class DukeMtmc:
    noun = "person"
    num_cameras = 8
    num_views = 0
    splits = ("train", "query", "gallery")
    known_counts: ClassVar[dict[str, tuple[int, int]]] = {
        "train": (16522, 702),
        "query": (2228, 702),
        "gallery": (17661, 1110),
    }
    folder_name = "DukeMTMC-reID"

    def records(self, source: Source, warn: Callable[[str], None]) -> Iterator[ImageRecord]:
        name = self.folder_name
        base = find_base(source, [name, f"dukemtmcreid/{name}", ""], FOLDERS.values())
        for split, theirs in FOLDERS.items():
            folder = f"{base}{theirs}"
            for path, found in match_names(source, image_files(source, folder), NAME, EXPECTED, below=f"{folder}/"):
                yield ImageRecord(path, found["identity"], split, int(found["camera"]) - 1, time=found["time"])
