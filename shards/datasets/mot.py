"""Sequences of MOTChallenge, or of a tracker: boxes in frames become images, tracks become identities.

    ROOT/[train/]SEQUENCE/img1/000001.jpg     frames; ROOT may also be one sequence
         SEQUENCE/gt/gt.txt                   frame,track,left,top,width,height,confidence,class,visibility
    TRACKS/SEQUENCE.txt                       a tracker's file in place of gt.txt, with the same first six columns

Of a track every n-th frame is taken, from its first on. A sequence is a camera. Tracks are numbered anew in each
sequence, unless all of them share their numbers. There is no split, so the tracks are divided (`division.py`).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from shards import storage
from shards.datasets.division import divide, explain
from shards.datasets.layout import image_files
from shards.errors import DataError, examples, shown
from shards.images.listing import list_folder
from shards.records import Crop, ImageRecord
from shards.storage import Source, join

FRAMES, TRUTH = "img1", "gt/gt.txt"
PEOPLE = ("-1", "1", "")
"""Classes that are taken: people, or none told. The others of MOTChallenge are vehicles, reflections, ..."""


class Box(NamedTuple):
    """A line of a file of tracks."""

    frame: int
    track: str
    edges: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Mot:
    tracks: str = ""
    """Folder of a tracker's SEQUENCE.txt, in place of gt/gt.txt."""
    frame_step: int = 10
    """Frames between two images of a track."""
    shared_tracks: bool = False
    """Whether a number is the same one in all sequences, as where several cameras see one place."""
    test_share: float = 0.3
    seed: int = 0

    noun = "person"
    num_cameras = None
    num_views = 0
    splits = ("train", "query", "gallery")
    known_counts: ClassVar[dict[str, tuple[int, int]]] = {}

    def records(self, source: Source, warn: Callable[[str], None]) -> Iterator[ImageRecord]:
        sequences = self._sequences(source)
        names = [_name(source, folder) for folder in sequences]
        found = [
            record
            for camera, (folder, name) in enumerate(zip(sequences, names, strict=True))
            for record in self._sequence(source, folder, name, camera)
        ]
        source.notes.append(
            f"every {self.frame_step}th frame of a track is an image, cut out by its box; cameras: "
            + examples([f"{name} is {camera}" for camera, name in enumerate(names)])
        )
        if len({(record.identity, record.camera) for record in found}) == len({record.identity for record in found}):
            warn(
                "every track is in one sequence, so no query has a match under another camera: evaluate with "
                "eval.rule=none, or give --shared-tracks where the sequences number their tracks alike"
            )
        source.notes.append(explain(self.test_share, self.seed))
        yield from divide(found, self.test_share, self.seed)

    def _sequences(self, source: Source) -> list[str]:
        """Folders of sequences, "" the root itself. Raises DataError where there is none."""
        inner = f"/{FRAMES}/"
        paths = [f"/{path}" for path in list_folder(source, "").images]
        folders = {path.partition(inner)[0].lstrip("/") for path in paths if inner in path}
        if not folders:
            raise DataError(f"{source.root}: holds no sequence, which is a folder with frames in {FRAMES}/")
        return sorted(folders)

    def _sequence(self, source: Source, folder: str, name: str, camera: int) -> Iterator[ImageRecord]:
        base = f"{folder}/" if folder else ""
        frames = _frames(source, f"{base}{FRAMES}")
        where = join(self.tracks, f"{name}.txt") if self.tracks else join(source.root, base + TRUTH)
        text = storage.read_text(where) if self.tracks else source.read_text(base + TRUTH)
        of_track = defaultdict(list)
        for box in _boxes(text, where):
            of_track[box.track].append(box)
        for track, boxes in of_track.items():
            identity = track if self.shared_tracks else f"{name}-{track}"
            first = min(box.frame for box in boxes)
            for box in boxes:
                if (box.frame - first) % self.frame_step:
                    continue
                if box.frame not in frames:
                    raise DataError(f"{where}: frame {box.frame} is not in {base}{FRAMES}/; the copy is incomplete")
                path = f"{base}{FRAMES}/{box.frame:06d}-{track}"
                crop = Crop(frames[box.frame], box.edges)
                yield ImageRecord(path, identity, "", camera, time=str(box.frame), crop=crop)


def _name(source: Source, folder: str) -> str:
    return (folder or source.root.rstrip("/")).rpartition("/")[2].removesuffix(".zip")


def _frames(source: Source, folder: str) -> dict[int, str]:
    """Paths by the numbers that are the files' names."""
    paths = image_files(source, folder)
    stems = {path: path.rpartition("/")[2].partition(".")[0] for path in paths}
    if odd := [path for path, stem in stems.items() if not stem.isdecimal()]:
        raise DataError(
            f"{source.root}: frames are named by their numbers, as 000001.jpg; these are not: {examples(odd)}"
        )
    return {int(stem): path for path, stem in stems.items()}


def _boxes(text: str, where: str) -> Iterator[Box]:
    """Of people, and not marked as to be ignored. Raises DataError that names the line."""
    for number, line in enumerate(text.splitlines(), 1):
        cells = [cell.strip() for cell in line.replace(",", " ").split()]
        if not cells:
            continue
        try:
            frame, track = (int(float(cell)) for cell in cells[:2])
            left, top, width, height = (float(cell) for cell in cells[2:6])
            confidence = float(cells[6]) if len(cells) > 6 else 1.0
            if track < 0 or not math.isfinite(left + top + width + height):
                raise ValueError("no track, or not a finite number")
        except (ValueError, OverflowError):
            raise DataError(
                f"{where}, line {number}: {shown(line)} is not frame,track,left,top,width,height,...: numbers in pixels"
            ) from None
        kind = cells[7].removesuffix(".0") if len(cells) > 8 else ""
        edges = (math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height))
        if confidence and kind in PEOPLE and width >= 1 and height >= 1 and min(edges[2:]) > 0:
            yield Box(frame, str(track), edges)
