"""Omniglot's small background set: characters as identities, the people who drew them as cameras.

    images_background_small1/ALPHABET/characterNN/IIII_DD.png

Reads the zip as it is downloaded, or the folder it unpacks to. The Greek characters are kept for the test, so
test identities are new ones: that is what re-identification means.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from shards.datasets.layout import image_files, match_names
from shards.records import ImageRecord
from shards.storage import Source

NAME = re.compile(
    r"(?:images_background_small1/)?(?P<identity>(?P<alphabet>\w+)/character\d\d)/\d{4}_(?P<drawer>\d\d)\.png"
)
QUERY_DRAWERS = range(1, 6)


@dataclass(frozen=True)
class Omniglot:
    noun = "character"
    num_cameras = 20
    num_views = 0
    splits = ("train", "query", "gallery")
    known_counts: ClassVar[dict[str, tuple[int, int]]] = {
        "train": (2240, 112),
        "query": (120, 24),
        "gallery": (360, 24),
    }

    def records(self, source: Source, warn: Callable[[str], None]) -> Iterator[ImageRecord]:
        files = image_files(source, "")
        for path, name in match_names(source, files, NAME, "ALPHABET/characterNN/IIII_DD.png"):
            drawer = int(name["drawer"])
            if name["alphabet"] != "Greek":
                split = "train"
            else:
                split = "query" if drawer in QUERY_DRAWERS else "gallery"
            yield ImageRecord(path, name["identity"], split, camera=drawer - 1)
