"""Market-1501: people under 6 cameras, with distractors in the gallery.

    Market-1501-v15.09.15/ (or the root itself)
        bounding_box_train/ query/ bounding_box_test/   0002_c1s1_000451_03.jpg = identity_camera+sequence_frame_box
    distractors_500k/ (in it, beside it, or in the root)     any names, 500,000 boxes that show none of the identities

Identity -1 is junk (parts of people) and left out; 0000 are distractors, which stay in the gallery. The 500k further
ones join them where they lie there; of some a camera is known by the name.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from shards.datasets.layout import find_base, image_files, match_names
from shards.records import ImageRecord
from shards.storage import Source

NAME = re.compile(r"(?P<identity>-1|\d{4})_c(?P<camera>[1-6])(?P<time>s\d+_\d+)_\d+\.jpg(\.jpg)?")
EXPECTED = "0002_c1s1_000451_03.jpg, camera c1 to c6"
FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
JUNK = "-1"
DISTRACTOR = "0000"
DISTRACTOR_FOLDERS = ("distractors_500k", "distractors")
CAMERA = re.compile(r"(?:^|_)c([1-6])(?=s\d|_|\.)")


@dataclass(frozen=True)
class Market1501:
    noun = "person"
    num_cameras = 6
    num_views = 0
    splits = ("train", "query", "gallery")
    known_counts: ClassVar[dict[str, tuple[int, int]]] = {
        "train": (12936, 751),
        "query": (3368, 750),
        "gallery": (15913, 751),
    }

    def records(self, source: Source, warn: Callable[[str], None]) -> Iterator[ImageRecord]:
        base = find_base(source, ["Market-1501-v15.09.15", ""], FOLDERS.values())
        for split, theirs in FOLDERS.items():
            folder = f"{base}{theirs}"
            for path, name in match_names(source, image_files(source, folder), NAME, EXPECTED, below=f"{folder}/"):
                if name["identity"] != JUNK:
                    yield ImageRecord(path, name["identity"], split, int(name["camera"]) - 1, time=name["time"])
        yield from _distractors(source, base)


def _distractors(source: Source, base: str) -> Iterator[ImageRecord]:
    """The 500k, from the first of their folders that holds any."""
    for folder in (f"{place}{name}" for place in dict.fromkeys((base, "")) for name in DISTRACTOR_FOLDERS):
        if paths := image_files(source, folder):
            source.notes.append(f"{len(paths):,} distractors of {folder}/ are in the gallery, as identity {DISTRACTOR}")
            for path in paths:
                seen = CAMERA.search(path.rpartition("/")[2])
                yield ImageRecord(path, DISTRACTOR, "gallery", int(seen[1]) - 1 if seen else -1)
            return
