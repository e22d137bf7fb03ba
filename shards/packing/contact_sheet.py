"""Some identities of a packed dataset as one picture, to look at: `launch/pack.py inspect --sheet`.

    index.parquet, *.tar ──▶ [contact sheet] ──▶ FILE.png

One row an identity, training identities first; each image under its split, camera and view.
"""

from collections import defaultdict
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from shards import storage
from shards.dataset_file import read_dataset_json
from shards.errors import DataError
from shards.images.pictures import BadPicture, read_picture
from shards.index_table import read_index_table
from shards.source import ShardSource

CELL = 128
"""Pixels, the longer side of an image on the sheet."""
GAP = 8
TEXT = 14
"""Pixels of a line of text."""
MAX_COLUMNS = 10


def write_sheet(url: str, path: Path, identities: int = 8) -> None:
    """Write a PNG with `identities` rows, half of them from train. Raises DataError on an unreadable image."""
    rows = _choose(read_index_table(url, read_dataset_json(url)).to_pylist(), identities)
    source = ShardSource(url)
    columns = max(len(images) for images in rows)
    height = TEXT + CELL + TEXT + GAP
    sheet = Image.new("RGB", (GAP + columns * (CELL + GAP), GAP + len(rows) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT - 3)
    for line, images in enumerate(rows):
        top = GAP + line * height
        draw.text((GAP, top), f"identity {images[0]['identity']}", "black", font)
        for column, row in enumerate(images):
            left = GAP + column * (CELL + GAP)
            picture = _read(source, row)
            picture.thumbnail((CELL, CELL))
            sheet.paste(picture, (left + (CELL - picture.width) // 2, top + TEXT + (CELL - picture.height) // 2))
            draw.text((left, top + TEXT + CELL), _caption(row), "dimgray", font)
    with storage.write_atomic(str(path)) as file:
        sheet.save(file, "PNG")


def _caption(row: dict[str, Any]) -> str:
    camera = f"camera {row['camera']}" if row["camera"] >= 0 else "no camera"
    view = f", view {row['view']}" if row["view"] >= 0 else ""
    return f"{row['split']} {camera}{view}"


def _choose(rows: list[dict[str, Any]], count: int) -> list[list[dict[str, Any]]]:
    """Identities at even distances, train first; of each, images from as many cameras as it has."""
    by_identity: dict[bool, dict[str, list[dict[str, Any]]]] = {True: defaultdict(list), False: defaultdict(list)}
    for row in rows:
        by_identity[row["split"] == "train"][row["identity"]].append(row)
    chosen = []
    for is_train, room in ((True, count - count // 2), (False, count // 2)):
        names = sorted(by_identity[is_train])
        step = max(len(names) // room, 1) if room else 1
        chosen += [_mix_cameras(by_identity[is_train][name])[:MAX_COLUMNS] for name in names[::step][:room]]
    return chosen


def _mix_cameras(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first image of every camera, then the second of every camera, and so on; a split after the other."""
    mixed = []
    for split in dict.fromkeys(row["split"] for row in rows):
        by_camera = defaultdict(list)
        for row in rows:
            if row["split"] == split:
                by_camera[row["camera"]].append(row)
        turns = zip_longest(*(by_camera[camera] for camera in sorted(by_camera)))
        mixed += [row for row in chain.from_iterable(turns) if row]
    return mixed


def _read(source: ShardSource, row: dict[str, Any]) -> Image.Image:
    data = source.read_range(row["shard"], row["offset"], row["offset"] + row["size"])
    try:
        return Image.fromarray(read_picture(data).pixels)
    except BadPicture as error:
        raise DataError(f"{source.where(row['shard'])}: {row['key']} cannot be read ({error}): run verify") from error
