"""Write one shard: read its images, check their headers, append them to a tar.

    shard plan ──▶ [writer, one process each] ──▶ train-000000.tar + its rows ──▶ build (index.parquet)

Every byte follows from the images and their records.
"""

import io
import json
import zlib
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from PIL import Image

from shards import storage
from shards.datasets.joint import locate
from shards.errors import StoreError
from shards.format import EXTENSIONS, IMAGE_FORMATS, TAR_END, make_key, metadata, tar_header, tar_padding
from shards.packing.processes import Advance
from shards.packing.shard_plan import PlannedShard
from shards.storage import Source

REPORT_EVERY = 64
"""Images between two reports of progress."""


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


class BadImage(Exception):
    """An image that cannot be read; the message is the reason."""


class _HasBadImages(Exception):
    """Leaves write_atomic, so that the shard does not get its name."""


class Encoded(NamedTuple):
    """An image as it goes into the shard. Width and height in pixels."""

    data: bytes
    extension: str
    width: int
    height: int


def rows_url(work: str, shard: str) -> str:
    return storage.join(work, shard.replace(".tar", ".json"))


def write_shard(job: WriteJob, advance: Advance) -> list[str]:
    """Write the tar and its rows; returns a line for every unreadable image, and writes nothing if there are any.

    The rows come first: a shard is finished when both are there and the sizes agree.
    """
    rows = ShardRows(job.shard.signature)
    bad: list[str] = []
    try:
        with storage.write_atomic(storage.join(job.out, job.shard.name), job.work) as file:
            _write_images(job, file, rows, bad, advance)
            if bad:
                raise _HasBadImages
            storage.write_json(rows_url(job.work, job.shard.name), vars(rows), job.work)
    except _HasBadImages:
        return bad
    return []


def _write_images(job: WriteJob, file: IO[bytes], rows: ShardRows, bad: list[str], advance: Advance) -> None:
    def append(data: bytes) -> None:
        file.write(data)
        rows.crc32 = zlib.crc32(data, rows.crc32)
        rows.num_bytes += len(data)

    unreported = 0
    for record, label in zip(job.shard.records, job.shard.labels, strict=True):
        source, path = locate(job.sources, record.path)
        try:
            image = encode(read_image(source, path), job.resize, job.quality)
        except BadImage as error:
            bad.append(f"{record.path} ({error})")
        else:
            key = make_key(record.path)
            append(tar_header(f"{key}.{image.extension}", len(image.data)))
            rows.offsets.append(rows.num_bytes)
            rows.sizes.append(len(image.data))
            rows.crcs.append(zlib.crc32(image.data))
            rows.widths.append(image.width)
            rows.heights.append(image.height)
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
    try:
        return source.read(path)
    except StoreError:  # the store fails, not the image
        raise
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error


def encode(data: bytes, resize: tuple[int, int] | None, quality: int) -> Encoded:
    """The bytes to store: the image's own, or those of a resized JPEG. Raises BadImage.

    Without resize only the header is read, and the whole image where its end looks cut off.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(IMAGE_FORMATS)) as image:
            if not resize:
                file_format = str(image.format)
                if not _ends_properly(data, file_format):
                    image.load()
                return Encoded(data, EXTENSIONS[file_format], image.width, image.height)
            height, width = resize
            small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    except Exception as error:  # PIL's decoders raise nearly anything on bad bytes
        raise BadImage("not a readable JPEG, PNG or WebP" if not data else str(error).splitlines()[0]) from error
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return Encoded(buffer.getvalue(), "jpg", width, height)


def _ends_properly(data: bytes, file_format: str) -> bool:
    if file_format == "PNG":
        return data[-8:-4] == b"IEND"
    if file_format == "WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return data.endswith(b"\xff\xd9")
