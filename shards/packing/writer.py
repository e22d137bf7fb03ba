"""Write one shard: read and decode its images, append them to a tar.

    shard plan ──▶ [writer, one process each] ──▶ train-000000.tar + its rows ──▶ build (index.parquet)

Every byte follows from the images and their records.
"""

import io
import json
import zlib
from dataclasses import dataclass, field
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from shards import storage
from shards.datasets.joint import locate
from shards.errors import StoreError
from shards.format import EXTENSIONS, TAR_END, metadata, tar_header, tar_padding
from shards.images.pictures import BadPicture, pixel_hash, read_picture
from shards.packing.processes import Advance
from shards.packing.shard_plan import PlannedShard
from shards.records import Crop
from shards.sealed import seal
from shards.storage import Source

REPORT_EVERY = 64
"""Images between two reports of progress."""
STORED_AS_PNG = "stored as PNG, without loss"
CUT_OUT = "cut out of a picture by their boxes"
"""Beside pictures.CHANGES: what shards do not hold as it is."""


@dataclass(frozen=True)
class WriteJob:
    """One task: a planned shard and all that is needed to write it in another process."""

    shard: PlannedShard
    sources: dict[str, Source]
    out: str
    work: str
    """Folder for working files and rows, on the file system of `out`."""
    resize: tuple[int, int] | None = None
    """(height, width) in pixels; None stores the original bytes."""
    quality: int = 0


@dataclass
class ShardRows:
    """What is known only after writing: places, checksums and sizes of a shard's images, in its order."""

    signature: str
    num_bytes: int = 0
    crc32: int = 0
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    pixels: list[str] = field(default_factory=list)
    """Hashes of the decoded images, before any resizing."""
    changes: list[list[str]] = field(default_factory=list)
    """What was or will be done to each image: pictures.CHANGES, STORED_AS_PNG."""


class _HasBadImages(Exception):
    """Leaves write_atomic, so that the shard does not get its name."""


class Encoded(NamedTuple):
    """An image as it goes into the shard. Width and height in pixels, as the stored file says them."""

    data: bytes
    extension: str
    width: int
    height: int
    pixels: str
    changes: list[str]


def rows_url(work: str, shard: str) -> str:
    return storage.join(work, shard.replace(".tar", ".json"))


def write_shard(job: WriteJob, advance: Advance) -> list[str]:
    """Write the tar and its rows; returns a line for every unreadable image, and writes nothing if there are any.

    The rows come first: a shard is finished when both are there and agree.
    """
    rows = ShardRows(job.shard.signature)
    bad: list[str] = []
    try:
        with storage.write_atomic(storage.join(job.out, job.shard.name), job.work) as file:
            _write_images(job, file, rows, bad, advance)
            if bad:
                raise _HasBadImages
            storage.write_json(rows_url(job.work, job.shard.name), seal(vars(rows)), job.work)
    except _HasBadImages:
        return bad
    return []


def _write_images(job: WriteJob, file: IO[bytes], rows: ShardRows, bad: list[str], advance: Advance) -> None:
    def append(data: bytes) -> None:
        file.write(data)
        rows.crc32 = zlib.crc32(data, rows.crc32)
        rows.num_bytes += len(data)

    unreported = 0
    for record, label, key in zip(job.shard.records, job.shard.labels, job.shard.keys, strict=True):
        source, path = locate(job.sources, record.file)
        try:
            image = encode(read_image(source, path), job.resize, job.quality, record.crop)
        except BadPicture as error:
            bad.append(f"{record.path} ({error})")
        else:
            append(tar_header(f"{key}.{image.extension}", len(image.data)))
            rows.offsets.append(rows.num_bytes)
            rows.sizes.append(len(image.data))
            rows.crcs.append(zlib.crc32(image.data))
            rows.widths.append(image.width)
            rows.heights.append(image.height)
            rows.pixels.append(image.pixels)
            rows.changes.append(image.changes)
            append(image.data + tar_padding(len(image.data)))
            facts = json.dumps(metadata(record, label), ensure_ascii=False).encode()
            append(tar_header(f"{key}.json", len(facts)) + facts + tar_padding(len(facts)))
        unreported += 1
        if unreported == REPORT_EVERY:
            advance(unreported)
            unreported = 0
    advance(unreported)
    append(TAR_END)


def read_image(source: Source, path: str) -> bytes:
    """A file's bytes. Raises BadPicture where it cannot be read, StoreError where the store fails."""
    try:
        return source.read(path)
    except StoreError:  # the store fails, not the image
        raise
    except OSError as error:
        raise BadPicture(error.strerror or str(error)) from error


def encode(data: bytes, resize: tuple[int, int] | None, quality: int, crop: Crop | None = None) -> Encoded:
    """The bytes to store: the image's own where shards hold its format, else those of a PNG, or of a resized JPEG.

    It is decoded in any case. Raises BadPicture unless it is whole, and where a crop lies outside of it.
    """
    picture = read_picture(data)
    if crop:
        picture = picture._replace(
            pixels=_cut_out(picture.pixels, crop), format="", changes=(*picture.changes, CUT_OUT)
        )
    pixels, changes = pixel_hash(picture.pixels), list(picture.changes)
    buffer = io.BytesIO()
    if resize:
        height, width = resize
        small = Image.fromarray(picture.pixels).resize((width, height), Image.Resampling.BICUBIC)
        small.save(buffer, "JPEG", quality=quality)
        return Encoded(buffer.getvalue(), "jpg", width, height, pixels, changes)
    if extension := EXTENSIONS.get(picture.format):
        return Encoded(data, extension, *picture.stored_size, pixels, changes)
    upright = Image.fromarray(picture.pixels)
    upright.save(buffer, "PNG")
    return Encoded(buffer.getvalue(), "png", *upright.size, pixels, [*changes, STORED_AS_PNG])


def _cut_out(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    left, top, right, bottom = crop.box
    part = pixels[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if not part.size:
        height, width = pixels.shape[:2]
        raise BadPicture(f"box {crop.box} lies outside of its {width} x {height} pixels")
    return np.ascontiguousarray(part)
