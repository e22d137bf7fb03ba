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
from typing import TYPE_CHECKING, ClassVar

from shards import storage
from shards.errors import MOST_SHOWN, DataError, StoreError, examples, shown
from shards.format import MOST_NUMBER, MOST_TEXT_BYTES
from shards.records import UNKNOWN_IDENTITIES, ImageRecord
from shards.storage import Source, path_fault

if TYPE_CHECKING:
    import pyarrow

TABLE_FORMATS = (".csv", ".parquet")
REQUIRED = ("path", "identity", "split")
SEPARATORS = {";": "semicolons (;)", "\t": "tabs", "|": "bars (|)"}
OPTIONAL = ("camera", "view", "time")


@dataclass(frozen=True)
class Manifest:
    table: str = ""
    """The CSV or Parquet file."""

    noun = "object"
    num_cameras = None
    num_views = None
    splits = ("train", "query", "gallery")
    known_counts: ClassVar[dict[str, tuple[int, int]]] = {}

    def records(self, source: Source, warn: Callable[[str], None]) -> Iterator[ImageRecord]:
        for number, row in read_table(self.table):
            where = f"{self.table}, row {number}"
            path = PurePosixPath(row["path"])
            if path.is_absolute() or ".." in path.parts or "\\" in row["path"]:
                raise DataError(
                    f"{where}: path {shown(row['path'])} must be posix and relative; give the folder it lies in as a "
                    "second --root"
                )
            if fault := path_fault(row["path"]):
                raise DataError(f"{where}: path {row['path'][:80]!a} {fault}")
            if row["split"] not in self.splits:
                raise DataError(f"{where}: split {shown(row['split'])} is not one of {', '.join(self.splits)}")
            for name in ("identity", "time"):
                if len(row.get(name, "").encode(errors="replace")) > MOST_TEXT_BYTES:
                    raise DataError(f"{where}: {name} is longer than {MOST_TEXT_BYTES:,} bytes")
            if row["identity"] in UNKNOWN_IDENTITIES:
                written = row["identity"] or "empty"
                raise DataError(f"{where}: identity is {written}, which is none: leave the image out, or give it one")
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
        raise DataError(f"{what} is {shown(text)}, not a number 0, 1, ...; leave it empty when unknown")
    if len(text) > len(str(MOST_NUMBER)) or int(text) > MOST_NUMBER:
        said = text[:MOST_SHOWN]
        raise DataError(f"{what} is {said}, above {MOST_NUMBER:,}: number them 0, 1, ... without large gaps")
    return int(text)


def read_table(url: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(row number from 1, cells as text) of each row that is not empty; raises DataError on faulty columns."""
    columns, rows = _parquet_rows(url) if url.lower().endswith(".parquet") else csv_rows(url)
    _check_header(url, columns)
    absent = [name for name in REQUIRED if name not in columns]
    unknown = [name for name in columns if name not in REQUIRED + OPTIONAL]
    twice = [name for name in dict.fromkeys(columns) if columns.count(name) > 1]
    for names, fault in ((absent, "lacks"), (unknown, "has unknown"), (twice, "has more than one")):
        if names:
            said = examples([name[:MOST_SHOWN] for name in names])
            raise DataError(
                f"{url} {fault} column {said}; columns are path, identity, split and optionally camera, view, time"
            )
    for number, row in enumerate(rows, 1):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(columns):
            raise DataError(f"{url}, row {number}: {len(row)} cells for {len(columns)} columns")
        yield number, {name: cell.strip() for name, cell in zip(columns, row, strict=True)}


def _check_header(url: str, columns: list[str]) -> None:
    """Tables that other programs write in ways of their own. Raises DataError with what to choose there."""
    first = f"{url}, line 1:"
    if len(columns) == 1 and (mark := next((mark for mark in SEPARATORS if mark in columns[0]), "")):
        raise DataError(f"{first} columns are separated by {SEPARATORS[mark]}; save the table with commas between them")
    if columns and (columns[0] in ("", "__index_level_0__") or columns[0].startswith("Unnamed: ")):
        raise DataError(f"{first} its first column has no name, as pandas writes its index; save it with index=False")
    if "" in columns:
        raise DataError(f"{first} column {columns.index('') + 1} has no name; remove the empty columns")


def csv_rows(url: str) -> tuple[list[str], Iterator[list[str]]]:
    """(columns, rows) of a table. Raises DataError where it is no CSV."""
    reader = csv.reader(io.StringIO(storage.read_text(url), newline=""), strict=True)

    def lines() -> Iterator[list[str]]:
        try:
            yield from reader
        except csv.Error as error:
            raise DataError(
                f"{url}, line {reader.line_num}: not readable as CSV ({error}); check its quotes"
            ) from error

    rows = lines()
    return [name.strip() for name in next(rows, [])], rows


def _parquet_rows(url: str) -> tuple[list[str], Iterator[tuple[str, ...]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(storage.read_bytes(url))).read()
        table.validate(full=True)
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file") from error
    except StoreError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{url}: not a Parquet file, or damaged ({str(error).splitlines()[0]})") from error
    for column in table.schema:
        if not _is_text_or_number(column):
            raise DataError(
                f"{url}: column {column.name} is of type {column.type}; write it as text"
                + (" or whole numbers" if column.name == "identity" else "")
            )
    columns = [["" if cell is None else str(cell) for cell in column.to_pylist()] for column in table.columns]
    return table.column_names, zip(*columns, strict=True)


def _is_text_or_number(column: "pyarrow.Field") -> bool:
    """Whether str() of a cell is what was meant: an identity 1.0 is not the identity 1, b'x' is not x."""
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind) or types.is_null(kind):
        return True
    return column.name not in REQUIRED and not (types.is_binary(kind) or types.is_large_binary(kind))
