"""Your own images in folders, one an identity, as they lie.

    ROOT/IDENTITY/anything                             divided into train, query and gallery (`division.py`)
    ROOT/{train,query,gallery}/IDENTITY/anything       divided already

The camera is what a pattern finds in the path below the identity's folder, or unknown.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from shards.datasets.division import divide, explain
from shards.datasets.layout import image_files
from shards.errors import DataError, examples
from shards.records import ImageRecord
from shards.storage import Source

GUESS = "guess"
GUESSES = (
    r"(?i)(?:^|[_\-./ ])cam(?:era)?[_\- ]?(\d+)",
    r"(?:^|[_\-./ ])[cC](\d{1,3})(?=[_\-./ sS]|$)",
)
"""What names of cameras look like: cam2, Camera_02, c2s1, c003."""
MOST_CAMERAS = 1000


@dataclass(frozen=True)
class Folders:
    camera_pattern: str = ""
    """A regular expression whose first group is the camera; `guess` takes what the names look like; empty: none."""
    test_share: float = 0.3
    """Of the identities, where ROOT is not divided."""
    seed: int = 0
    """Of that division."""

    noun = "object"
    num_cameras = None
    num_views = 0
    splits = ("train", "query", "gallery")
    known_counts: ClassVar[dict[str, tuple[int, int]]] = {}

    def records(self, source: Source, warn: Callable[[str], None]) -> Iterator[ImageRecord]:
        places = [path.split("/") for path in image_files(source, "")]
        top = {place[0] for place in places if len(place) > 1}
        divided = bool(top & set(self.splits))
        if divided and (others := sorted(top - set(self.splits))):
            raise DataError(
                f"{source.root}: {examples(others)} beside {examples(sorted(top & set(self.splits)))}: the folders "
                "of a divided root are train, query and gallery; rename them, or take the others out"
            )
        depth = 2 if divided else 1
        if loose := ["/".join(place) for place in places if len(place) <= depth]:
            form = "ROOT/{train,query,gallery}/IDENTITY/" if divided else "ROOT/IDENTITY/"
            raise DataError(
                f"{source.root}: {len(loose):,} images lie in no identity's folder: {examples(loose)}; the layout is "
                f"{form}image"
            )
        pattern = self._pattern(source, ["/".join(place[depth:]) for place in places])
        found = [_camera_name(pattern, "/".join(place[depth:])) for place in places]
        numbers = number_cameras(found, self.camera_pattern)
        if pattern and (unseen := found.count("")):
            warn(f"--camera-pattern finds no camera in {unseen:,} of {len(found):,} names: these are unknown")
        if numbers:
            source.notes.append("cameras: " + examples([f"{name} is {number}" for name, number in numbers.items()]))
        records = (
            ImageRecord("/".join(place), place[depth - 1], place[0] if divided else "", numbers.get(camera, -1))
            for place, camera in zip(places, found, strict=True)
        )
        if divided:
            yield from records
            return
        source.notes.append(explain(self.test_share, self.seed))
        yield from divide(records, self.test_share, self.seed)

    def _pattern(self, source: Source, names: list[str]) -> "re.Pattern[str] | None":
        """The one that is asked for. A guess that is not is shown."""
        if self.camera_pattern and self.camera_pattern != GUESS:
            return compiled(self.camera_pattern)
        guess = _guess(names)
        if self.camera_pattern:
            if guess is None:
                raise DataError(f"--camera-pattern {GUESS}: no names look as if they named cameras; give a pattern")
            source.notes.append(f"--camera-pattern {guess.pattern!r} is the guess that is used")
            return guess
        if guess is not None:
            cameras = sorted({_camera_name(guess, name) for name in names})
            source.notes.append(
                f"names look as if they named {len(cameras)} cameras ({examples(cameras)}), which are taken as "
                f"unknown: confirm with --camera-pattern {GUESS}, or give a pattern"
            )
        return None


def compiled(pattern: str) -> "re.Pattern[str]":
    """Raises DataError where it is no regular expression, or has no group for the camera."""
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise DataError(f"--camera-pattern {pattern!r} is no regular expression: {error}") from None
    if not found.groups:
        raise DataError(f"--camera-pattern {pattern!r} has no group: put brackets around the camera, as in 'c(\\d+)'")
    return found


def number_cameras(names: Iterable[str], pattern: str) -> dict[str, int]:
    """0 … C-1 by their names, those that are numbers in the order of their size. Raises DataError where there are more
    than cameras can be."""
    found = set(names) - {""}
    cameras = sorted((name for name in found if name.isdecimal()), key=int)
    cameras += sorted(name for name in found if not name.isdecimal())
    if len(cameras) > MOST_CAMERAS:
        raise DataError(
            f"--camera-pattern {pattern!r} finds {len(cameras):,} cameras, {examples(cameras)}: it names something else"
        )
    return {name: number for number, name in enumerate(cameras)}


def _camera_name(pattern: "re.Pattern[str] | None", name: str) -> str:
    """As the name has it; empty where it has none. 02 and 2 are one camera."""
    found = pattern.search(name) if pattern else None
    camera = (found[1] or "") if found else ""
    return str(int(camera)) if camera.isdecimal() else camera


def _guess(names: list[str]) -> "re.Pattern[str] | None":
    """A pattern that finds a camera in every name, and more than one of them."""
    for pattern in map(re.compile, GUESSES):
        cameras = {_camera_name(pattern, name) for name in names}
        if "" not in cameras and 1 < len(cameras) <= MOST_CAMERAS:
            return pattern
    return None
