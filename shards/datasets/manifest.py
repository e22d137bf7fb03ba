"""Your own images, described by one table (CSV or Parquet).

    path,identity,split,camera,view,time      the last three may be absent, or empty in a row
    crops/a/1.jpg,alice,train,0,,             split is train, query or gallery; numbers are 0-based

Paths are relative to the table's folder, or to a second --root.
"""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from shards import storage
from shards.datasets.layout import IMAGE_ENDINGS
from shards.errors import DataError
from shards.records import ImageRecord
from shards.storage import Source

TABLE_FORMATS = (".csv", ".parquet")
REQUIRED = ("path", "identity", "split")
OPTIONAL = ("camera", "view", "time")


@dataclass(frozen=True)
class Manifest:
    table: str = ""
    """The CSV or Parquet file."""

    noun = "object"
    num_cameras = None
    num_views = None
    splits = ("train", "query", "gallery")
    known_counts = {}  # noqa: RUF012

    def records(self, source: Source, warn: Callable[[str], None]) -> Iterator[ImageRecord]:
        for number, row in read_table(self.table):
            where = f"{self.table}, row {number}"
            path = PurePosixPath(row["path"])
            if path.is_absolute() or ".." in path.parts or "\\" in row["path"]:
                raise DataError(
                    f"{where}: path {row['path']!r} must be posix and relative; give the folder it lies in as a "
                    "second --root"
                )
            if path.suffix.lower() not in IMAGE_ENDINGS:
                raise DataError(f"{where}: {row['path']!r} is not a .jpg, .png or .webp file")
            if row["split"] not in self.splits:
                raise DataError(f"{where}: split {row['split']!r} is not one of {', '.join(self.splits)}")
            if not row["identity"]:
                raise DataError(f"{where}: identity is empty")
            yield ImageRecord(
                str(path),
                row["identity"],
                row["split"],
                number_or_unknown(row.get("camera", ""), f"{where}: camera"),
                number_or_unknown(row.get("view", ""), f"{where}: view"),
                row.get("time", ""),
            )


def number_or_unknown(text: str, what: str) -> int:
    """0, 1, ... or -1 for an empty cell; raises DataError for anything else."""
    text = text.removesuffix(".0")  # a column with gaps comes out of many tools as floats
    if text in ("", "-1"):
        return -1
    if not text.isdecimal():
        raise DataError(f"{what} is {text!r}, not a number 0, 1, ...; leave it empty when unknown")
    return int(text)


def read_table(url: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(row number from 1, cells as text) of each row; raises DataError on missing and unknown columns."""
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file") from error
    if url.lower().endswith(".parquet"):
        columns, rows = _parquet_rows(url, data)
    else:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        columns, rows = [name.strip() for name in next(reader, [])], reader
    absent = [name for name in REQUIRED if name not in columns]
    unknown = [name for name in columns if name not in REQUIRED + OPTIONAL]
    if absent or unknown:
        fault = f"lacks column {', '.join(absent)}" if absent else f"has unknown column {', '.join(unknown)}"
        raise DataError(f"{url} {fault}; columns are path, identity, split and optionally camera, view, time")
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise DataError(f"{url}, row {number}: {len(row)} cells for {len(columns)} columns")
        yield number, {name: cell.strip() for name, cell in zip(columns, row, strict=True)}


def _parquet_rows(url: str, data: bytes) -> tuple[list[str], Iterator[tuple[str, ...]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(data))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{url}: not a Parquet file ({error})") from error
    columns = [["" if cell is None else str(cell) for cell in column.to_pylist()] for column in table.columns]
    return table.column_names, zip(*columns, strict=True)
