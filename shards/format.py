"""The shard format in one place: names, the bytes of a tar record, the columns of the index.

    build ──▶ OUT/dataset.json  OUT/index.parquet  OUT/train-000000.tar ... ──▶ verify, loading

dataset.json is written last: without it there is no dataset.
"""

import hashlib
import json
import re
import tarfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shards import storage
from shards.errors import DamagedError
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
    return facts


def tar_header(name: str, num_bytes: int) -> bytes:
    """The header of one file: no owner, no date, so that equal input gives equal bytes."""
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def tar_padding(num_bytes: int) -> bytes:
    """Zeros that fill a file's last block."""
    return bytes(-num_bytes % TAR_BLOCK)


def index_schema() -> "pyarrow.Schema":
    """INDEX_COLUMNS as pyarrow takes them."""
    import pyarrow as pa

    return pa.schema([pa.field(name, kind) for name, kind in INDEX_COLUMNS.items()])


def read_index_table(url: str, dataset: dict[str, Any] | None = None) -> "pyarrow.Table":
    """index.parquet as it is written. dataset: dataset.json, which lists its checksum; without it none is compared.

    Raises as `parse_index`, and DamagedError when it is missing.
    """
    where = storage.join(url, INDEX_FILE)
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise DamagedError(f"{where}: no such file; copy it again or re-pack") from error
    return parse_index(where, data, dataset or {})


def parse_index(where: str, data: bytes, dataset: dict[str, Any]) -> "pyarrow.Table":
    """The table in index.parquet's bytes, its columns those of `index_schema`. Raises as `index_columns`."""
    import pyarrow as pa

    columns = index_columns(where, data, dataset)
    return pa.table({name: columns[name] for name in columns}, schema=index_schema())


def index_columns(
    where: str, data: bytes, dataset: dict[str, Any], coded: Sequence[str] = ()
) -> "Mapping[str, pyarrow.ChunkedArray]":
    """The columns in index.parquet's bytes, as `index_schema` has them, without nulls; each is decoded when it is
    asked for, and not kept.

    coded: columns of strings that are given as codes into dictionaries.
    Raises DamagedError unless these are the bytes that dataset.json lists, and can be read. Damaged bytes are not
    decoded where dataset.json lists them: a Parquet reader may do anything with them.
    """
    packed = dataset.get("files", {}).get(INDEX_FILE)
    if packed and packed != {"bytes": len(data), "crc32": zlib.crc32(data)}:
        raise DamagedError(
            f"{where}: not the file that {DATASET_FILE} (fingerprint {dataset['fingerprint']}) was packed with; one "
            "of the two comes from another packing, is damaged or was cut short: copy both again or re-pack"
        )
    return _IndexColumns(where, data, coded, trusted=bool(packed))


class _IndexColumns(Mapping[str, Any]):
    """The columns of index.parquet by their names."""

    def __init__(self, where: str, data: bytes, coded: Sequence[str], trusted: bool):
        """trusted: its checksum is right."""
        import pyarrow as pa
        from pyarrow import parquet

        self.where, self.coded, self.trusted = where, coded, trusted
        self.schema = index_schema()
        with self._reading():
            self.file = parquet.ParquetFile(pa.BufferReader(data), read_dictionary=list(coded))
            names = self.file.schema_arrow.names
        if missing := [name for name in self.schema.names if name not in names]:
            raise DamagedError(f"{where}: no column {', '.join(missing)}; pack the dataset again")
        if doubled := [name for name in self.schema.names if names.count(name) > 1]:
            raise DamagedError(f"{where}: has column {', '.join(doubled)} twice; pack the dataset again")

    def __len__(self) -> int:
        return len(self.schema)

    def __iter__(self) -> Iterator[str]:
        return iter(self.schema.names)

    def __getitem__(self, name: str) -> "pyarrow.ChunkedArray":
        import pyarrow as pa

        kind = self.schema.field(name).type
        with self._reading():
            column = self.file.read(columns=[name]).column(0)
            if name not in self.coded:
                column = column.cast(kind)
            elif column.type != pa.dictionary(pa.int32(), kind):
                column = column.cast(kind).dictionary_encode()
            if not self.trusted:
                column.validate(full=True)
        if column.null_count:
            raise DamagedError(f"{self.where}: column {name} has empty cells; pack the dataset again")
        return column

    @contextmanager
    def _reading(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError) as error:
            fault = str(error).splitlines()[0]
            raise DamagedError(f"{self.where}: damaged ({fault}); copy it again or re-pack") from error


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
