"""The shard format in one place: names, the bytes of a tar record, the columns of the index.

    build ──▶ OUT/dataset.json  OUT/index.parquet  OUT/train-000000.tar ... ──▶ verify, loading

dataset.json is written last: without it there is no dataset.
"""

import hashlib
import io
import json
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from shards.records import ImageRecord

if TYPE_CHECKING:
    import pyarrow

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
INDEX_FILE = "index.parquet"
TAR_BLOCK = 512
TAR_END = bytes(2 * TAR_BLOCK)
IMAGE_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),  # MPO: one with further pictures behind the first
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "AVIF": (".avif", ".avifs"),
}
"""PIL's formats that are read, and the endings of their files. Any of the endings may hide any of the formats."""
IMAGE_ENDINGS = tuple(ending for endings in IMAGE_FORMATS.values() for ending in endings)
"""File names that are images, in lower case: the one list of all commands."""
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""PIL's formats whose bytes are kept in a shard -> EXT. All others are stored as PNG."""
INDEX_COLUMNS = {
    "split": "string",
    "shard": "string",
    "key": "string",
    "offset": "int64",  # of the image's bytes in the tar
    "size": "int64",
    "crc32": "uint32",
    "identity": "string",
    "label": "int64",
    "camera": "int32",
    "view": "int32",
    "time": "string",
    "lists": "string",
    "width": "int32",
    "height": "int32",
}
"""Columns of index.parquet and their Arrow types: one row an image, in the order of the tars."""
MOST_IMAGES = 1 << 28
MOST_NUMBER = 9_999
"""Of a camera or view. Their numbers are counted up to the largest, and each gets a row of the model's tables."""
MOST_TEXT_BYTES = 4095
"""Of a key, an identity or a time: what a path can have."""
INDEX_BOUNDS = {
    "offset": (0, 1 << 50),
    "size": (0, 1 << 40),
    "label": (-1, MOST_IMAGES),
    "camera": (-1, MOST_NUMBER),
    "view": (-1, MOST_NUMBER),
    "width": (0, 1 << 30),
    "height": (0, 1 << 30),
}
"""Smallest and largest number of a column."""
TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, LookupError, EOFError, RecursionError, AttributeError)
"""What tarfile raises for damaged headers, its own and those of what it is made of."""


MOST_READS_AT_END = 16
"""tarfile looks for the rest of a sparse file's map behind the end of the archive, without end."""
PLAIN_NAME = re.compile(r"[^/\\\0]{1,255}(?<!^\.)(?<!^\.\.)")
"""A name of a file directly below a folder."""
JSON_COLUMNS = ("identity", "label", "camera", "view", "time")
"""Those that KEY.json repeats; it has `lists` too where that is not empty."""


def make_key(path: str) -> str:
    """Name of an image in its shard: the source path without its extension, odd characters replaced by `_`.

    Letters and digits of any script stay, with the marks that belong to them, and so do `-` and `_`.
    """
    return re.sub(r"[^\w-]", lambda odd: odd[0] if unicodedata.category(odd[0])[0] == "M" else "_", _stem(path))


def make_keys(paths: Sequence[str]) -> list[str]:
    """The keys of a split's images. Those that would be the same each get a short hash of their path behind them."""
    keys = [make_key(path) for path in paths]
    counts = Counter(keys)
    return [_hashed_key(path) if counts[key] > 1 else key for key, path in zip(keys, paths, strict=True)]


def is_key_of(key: str, path: str) -> bool:
    """Whether the image at a source path can have this key. Earlier versions kept ASCII letters only."""
    return key in (make_key(path), _hashed_key(path), ascii_key(path))


def ascii_key(path: str) -> str:
    """`make_key` of earlier versions."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", _stem(path))


def _hashed_key(path: str) -> str:
    return f"{make_key(path)}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _stem(path: str) -> str:
    folder, _, name = path.rpartition("/")
    stem = name.rsplit(".", 1)[0] if "." in name else name
    return f"{folder}/{stem}" if folder else stem


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def metadata(record: ImageRecord, label: int) -> dict[str, Any]:
    """What KEY.json says. `path` is the source path below its root."""
    facts: dict[str, Any] = {name: label if name == "label" else getattr(record, name) for name in JSON_COLUMNS}
    facts["path"] = record.path
    if record.lists:
        facts["lists"] = record.lists
    if record.attributes:
        facts["attributes"] = dict(record.attributes)
    if record.crop:
        facts["crop"] = {"file": record.crop.file, "box": list(record.crop.box)}
    if record.caption:
        facts["caption"] = record.caption
    return facts


def tar_header(name: str, num_bytes: int) -> bytes:
    """The header of one file: no owner, no date, so that equal input gives equal bytes."""
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def tar_padding(num_bytes: int) -> bytes:
    """Zeros that fill a file's last block."""
    return bytes(-num_bytes % TAR_BLOCK)


class BadTar(ValueError):
    """Not a tar of whole regular files; the message is the reason."""


def tar_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each member of an uncompressed tar. Raises BadTar, after the members before the fault.

    A header is a claim. Python's tarfile would fill the holes of a sparse file of a terabyte with zeros, and unpack a
    compressed archive: here a member is taken only where the archive holds as many bytes as it says.
    """
    try:
        with tarfile.open(fileobj=_Archive(data), mode="r:") as tar:
            for info in tar:
                yield info.name, _content(info, data)
    except BadTar:
        raise
    except TAR_ERRORS as error:
        raise BadTar(f"{error.args[0] if error.args else type(error).__name__}".splitlines()[0]) from error


def first_member(block: bytes) -> tuple[tarfile.TarInfo | None, bytes]:
    """The first member and as much of its content as the block holds; (None, b"") where its header is damaged."""
    try:
        with tarfile.open(fileobj=_Archive(block), mode="r:") as tar:
            info = tar.next()
        if info is None or _fault(info):
            return None, b""
        return info, block[info.offset_data :][: info.size]
    except TAR_ERRORS:
        return None, b""


def _content(info: tarfile.TarInfo, data: bytes) -> bytes:
    if fault := _fault(info):
        raise BadTar(fault)
    content = data[info.offset_data : info.offset_data + info.size]
    if len(content) < info.size:
        raise BadTar(f"{info.name[:80]!r} is to have {info.size:,} bytes, {len(content):,} are there")
    return content


def _fault(info: tarfile.TarInfo) -> str:
    if not info.isreg() or info.sparse is not None:
        return f"{info.name[:80]!r} is no regular file"
    return f"{info.name[:80]!r} is to have {info.size} bytes" if info.size < 0 else ""


class _Archive(io.BytesIO):
    reads_at_end = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.reads_at_end += not data
        if self.reads_at_end > MOST_READS_AT_END:
            raise EOFError("ends within a header")
        return data


def index_schema() -> "pyarrow.Schema":
    """INDEX_COLUMNS as pyarrow takes them."""
    import pyarrow as pa

    return pa.schema([pa.field(name, kind) for name, kind in INDEX_COLUMNS.items()])


def fingerprint(facts: Iterable[Any], table: "pyarrow.Table") -> str:
    """Hash of everything that results can depend on: dataset facts and, in order, each image and its content.

    Where an image lies (shard, offset) is left out, so another --shard-mb keeps the fingerprint.
    """
    digest = hashlib.sha256(json.dumps(list(facts)).encode())
    kept = table.select([name for name in table.column_names if name not in ("shard", "offset")])
    for batch in kept.to_batches(max_chunksize=1 << 14):  # a whole index as Python objects is 100s of MB
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update(repr(row).encode())
    return digest.hexdigest()[:32]
