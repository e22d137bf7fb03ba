"""index.parquet's bytes -> the table in them, or one line that says why they are no index.

    index.parquet ──▶ [index table] ──▶ loading/index_file, verify, overview

The one place where it is read. Whether they are the bytes that were packed is asked first, then what a Parquet file
says of itself, then every column against the bounds of `format.py`: memory is taken for what has passed.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from shards import storage
from shards.errors import DamagedError, shown
from shards.format import (
    DATASET_FILE,
    INDEX_BOUNDS,
    INDEX_COLUMNS,
    INDEX_FILE,
    MOST_IMAGES,
    MOST_TEXT_BYTES,
    PLAIN_NAME,
    index_schema,
)
from shards.records import SPLITS

TEXTS = [name for name, kind in INDEX_COLUMNS.items() if kind == "string"]
CODES = ("split", "shard", "identity")
PIECE_ROWS = 1 << 16
USUAL_TEXT_BYTES = 256
"""Of a column's texts on average: a few bytes of a Parquet file can stand for a long text in every row."""
REMEDY = "copy it again or re-pack"


def read_index_table(url: str, dataset: dict[str, Any] | None = None) -> pa.Table:
    """index.parquet as it is written. dataset: dataset.json, which lists its checksum; without it none is compared.

    Raises as `parse_index`, and DamagedError when it is missing.
    """
    where = storage.join(url, INDEX_FILE)
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise DamagedError(f"{where}: no such file; {REMEDY}") from error
    return parse_index(where, data, dataset or {})


def parse_index(where: str, data: bytes, dataset: dict[str, Any]) -> pa.Table:
    """The table in index.parquet's bytes, its columns those of `index_schema`. Raises as `index_columns`."""
    columns = index_columns(where, data, dataset)
    return pa.table({name: columns[name] for name in columns}, schema=index_schema())


def index_columns(
    where: str, data: bytes, dataset: dict[str, Any], coded: Sequence[str] = ()
) -> Mapping[str, pa.ChunkedArray]:
    """The columns in index.parquet's bytes, as `index_schema` has them, without nulls and within their bounds; each is
    decoded when it is asked for, and not kept.

    coded: columns of strings that are given as codes into dictionaries.
    Raises DamagedError unless these are the bytes that dataset.json lists, and can be read. Damaged bytes are not
    decoded where dataset.json lists them: a Parquet reader may do anything with them.
    """
    packed = dataset.get("files", {}).get(INDEX_FILE)
    if packed and (len(data), zlib.crc32(data)) != (packed["bytes"], packed.get("crc32", zlib.crc32(data))):
        raise DamagedError(
            f"{where}: not the file that {DATASET_FILE} (fingerprint {dataset['fingerprint']}) was packed with; one "
            "of the two comes from another packing, is damaged or was cut short: copy both again or re-pack"
        )
    columns = _IndexColumns(where, data, dataset, coded)
    if fault := next(_faults_between(_IndexColumns(where, data, dataset, CODES), dataset), ""):
        raise DamagedError(f"{where}: {fault}; {REMEDY}")
    return columns


class _IndexColumns(Mapping[str, Any]):
    """The columns of index.parquet by their names."""

    def __init__(self, where: str, data: bytes, dataset: dict[str, Any], coded: Sequence[str]):
        self.where, self.dataset, self.coded = where, dataset, coded
        self.is_listed = bool(dataset.get("files", {}).get(INDEX_FILE))
        self.schema = index_schema()
        with self._reading():
            self.file = parquet.ParquetFile(pa.BufferReader(data), read_dictionary=TEXTS)
            names, self.num_rows = self.file.schema_arrow.names, self.file.metadata.num_rows
        if missing := [name for name in self.schema.names if name not in names]:
            raise DamagedError(f"{where}: no column {', '.join(missing)}; pack the dataset again")
        if doubled := [name for name in self.schema.names if names.count(name) > 1]:
            raise DamagedError(f"{where}: has column {', '.join(doubled)} twice; pack the dataset again")
        _check_rows(where, self.num_rows, dataset)

    def __len__(self) -> int:
        return len(self.schema)

    def __iter__(self) -> Iterator[str]:
        return iter(self.schema.names)

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        kind = self.schema.field(name).type
        with self._reading():
            if name in TEXTS and name not in self.coded:
                column = pa.chunked_array(self._written_out(name, kind), kind)
            else:
                column = self.file.read(columns=[name]).column(0)
                if name in self.coded:
                    _check_texts(self.where, name, column.chunks)
                    column = column if _is_coded(column, kind) else column.cast(kind).dictionary_encode()
                else:
                    column = column.cast(kind)
            if not self.is_listed:
                column.validate(full=True)
        if column.null_count:
            raise DamagedError(f"{self.where}: column {name} has empty cells; pack the dataset again")
        if fault := _fault_of_numbers(name, column, self.dataset):
            raise DamagedError(f"{self.where}: {fault}; {REMEDY}")
        return column

    def _written_out(self, name: str, kind: pa.DataType) -> Iterator[pa.Array]:
        """A column of texts in pieces, each looked at while a text that is there many times still is there once."""
        for batch in self.file.iter_batches(PIECE_ROWS, columns=[name]):
            _check_texts(self.where, name, [batch.column(0)])
            yield batch.column(0).cast(kind)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except DamagedError:
            raise
        except (pa.ArrowException, OSError, ValueError, LookupError, MemoryError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DamagedError(f"{self.where}: damaged ({said[:200]}); {REMEDY}") from error


def _is_coded(column: pa.ChunkedArray, kind: pa.DataType) -> bool:
    return bool(column.type == pa.dictionary(pa.int32(), kind))


def _check_rows(where: str, rows: int, dataset: dict[str, Any]) -> None:
    counted = sum(split["images"] for split in dataset["splits"].values()) if "splits" in dataset else rows
    if rows != counted:
        splits = ", ".join(f"{split['images']} {name}" for name, split in sorted(dataset["splits"].items()))
        raise DamagedError(
            f"{where}: lists {rows} images, {DATASET_FILE} says {splits or 'none'}; the two files come from two "
            "packings: copy both again or re-pack"
        )
    if rows > MOST_IMAGES:
        raise DamagedError(f"{where}: is to have {rows:,} rows, more than {MOST_IMAGES:,}; {REMEDY}")


def _check_texts(where: str, name: str, chunks: Sequence[pa.Array]) -> None:
    """Before a text is written out once for every row that has it."""
    total = rows = 0
    for chunk in chunks:
        coded = isinstance(chunk, pa.DictionaryArray)
        texts = chunk.dictionary if coded else chunk
        if not pa.types.is_string(texts.type) and not pa.types.is_large_string(texts.type):
            return  # the cast says whether they can be texts
        lengths = pc.binary_length(texts)
        longest = pc.max(lengths).as_py() or 0
        if longest > MOST_TEXT_BYTES:
            raise DamagedError(f"{where}: column {name} has a text of {longest:,} bytes; {REMEDY}")
        total += pc.sum(lengths.take(chunk.indices) if coded else lengths).as_py() or 0
        rows += len(chunk)
    if total > USUAL_TEXT_BYTES * rows + (1 << 20):
        raise DamagedError(f"{where}: column {name} has {total:,} bytes of text for {rows:,} rows; {REMEDY}")


def _fault_of_numbers(name: str, column: pa.ChunkedArray, dataset: dict[str, Any]) -> str:
    """What no packing writes into a column, in words; empty where there is nothing."""
    if name not in INDEX_BOUNDS or not len(column):
        return ""
    low, high = INDEX_BOUNDS[name]
    found = pc.min_max(column).as_py()
    for value in found.values():
        if not low <= value <= high:
            return f"column {name} holds {value}, not from {low} to {high}"
    count = dataset.get(f"{name}s")
    if name in ("camera", "view") and count is not None and found["max"] >= count:
        return f"column {name} holds {found['max']}, but {DATASET_FILE} has {count} {name}s, which count from 0"
    return ""


def _faults_between(columns: _IndexColumns, dataset: dict[str, Any]) -> Iterator[str]:
    """What no packing writes into columns that belong together, one line a fault."""
    if not columns.num_rows:
        return
    splits, split_names = _coded(columns["split"])
    if odd := set(split_names) - set(SPLITS):
        yield f"column split holds {shown(min(odd))}, not one of {', '.join(SPLITS)}"
    yield from _shard_faults(columns, dataset.get("files", {}))
    yield from _label_faults(columns, np.array([name == "train" for name in split_names])[splits])


def _coded(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """int32 codes, and what they stand for."""
    values = single(column.unify_dictionaries())
    return numpy(values.indices), values.dictionary.to_pylist()


def _shard_faults(columns: _IndexColumns, files: dict[str, Any]) -> Iterator[str]:
    shards, names = _coded(columns["shard"])
    reach = np.full(len(names), -1)
    np.maximum.at(reach, shards, numpy(single(columns["offset"])) + numpy(single(columns["size"])))
    for name, end in zip(names, reach.tolist(), strict=True):
        if not PLAIN_NAME.fullmatch(name):
            yield f"column shard holds {shown(name)}, which is no name of a file"
        elif name in files and end > files[name]["bytes"]:
            yield f"an image of {name} ends at byte {end}, the shard has {files[name]['bytes']}"


def _label_faults(columns: _IndexColumns, is_train: np.ndarray) -> Iterator[str]:
    labels = numpy(single(columns["label"]))
    if (labels[~is_train] != -1).any():
        yield "column label holds others than -1 outside of train"
    mine = labels[is_train]
    if not len(mine):
        return
    if mine.min() < 0 or mine.max() >= len(mine) or not np.bincount(mine).all():
        yield "column label does not count the training identities 0, 1, ... without gaps"
        return
    identities, names = _coded(columns["identity"])
    own = identities[is_train]
    pairs = np.unique(mine * len(names) + own)
    if len(pairs) != mine.max() + 1 or len(pairs) != len(np.unique(own)):
        yield "column label gives one identity several labels, or one label several identities"


def single(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece, without a copy where it is in one piece."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def numpy(values: pa.Array) -> np.ndarray:
    """Numbers without nulls as they lie in memory. (`to_numpy` imports pandas first, for half a second.)"""
    data = np.frombuffer(values.buffers()[1], values.type.to_pandas_dtype())
    return data[values.offset : values.offset + len(values)]


def arrow(numbers: np.ndarray) -> pa.Int64Array:
    """int64 numbers for Arrow, likewise."""
    return pa.Int64Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(np.ascontiguousarray(numbers))])
