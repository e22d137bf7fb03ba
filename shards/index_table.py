"""index.parquet's bytes -> the table in them, or one line that says why they are no index.

    index.parquet ──▶ [index table] ──▶ loading/index_file, verify, overview

The one place where it is read. Whether they are the bytes that were packed is asked first, then what a Parquet file
says of itself, then every column against the bounds of `format.py`: memory is taken for what has passed.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from shards import storage
from shards.errors import DamagedError
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
    """The table in index.parquet's bytes, its columns those of `index_schema`, without nulls and within their bounds.

    Raises DamagedError unless these are the bytes that dataset.json lists, and can be read. Damaged bytes are not
    decoded where dataset.json lists them: a Parquet reader may do anything with them.
    """
    packed = dataset.get("files", {}).get(INDEX_FILE)
    if packed and (len(data), zlib.crc32(data)) != (packed["bytes"], packed.get("crc32", zlib.crc32(data))):
        raise DamagedError(
            f"{where}: not the file that {DATASET_FILE} (fingerprint {dataset['fingerprint']}) was packed with; one "
            "of the two comes from another packing, is damaged or was cut short: copy both again or re-pack"
        )
    try:
        table = _decode(where, data, dataset)
    except (pa.ArrowException, OSError, ValueError, LookupError, MemoryError) as error:
        if isinstance(error, DamagedError):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(f"{where}: damaged ({said[:200]}); {REMEDY}") from error
    if fault := next(_faults(table, dataset), ""):
        raise DamagedError(f"{where}: {fault}; {REMEDY}")
    return table


def _decode(where: str, data: bytes, dataset: dict[str, Any]) -> pa.Table:
    schema = index_schema()
    file = parquet.ParquetFile(pa.BufferReader(data), read_dictionary=TEXTS)
    names = file.schema_arrow.names
    if missing := [name for name in schema.names if name not in names]:
        raise DamagedError(f"{where}: no column {', '.join(missing)}; pack the dataset again")
    if twice := [name for name in schema.names if names.count(name) > 1]:
        raise DamagedError(f"{where}: more than one column {', '.join(twice)}; pack the dataset again")
    _check_rows(where, file.metadata.num_rows, dataset)
    table = file.read(columns=schema.names).select(schema.names)
    for name in TEXTS:
        _check_texts(where, name, table.column(name))
    table = table.cast(schema)
    if not dataset.get("files", {}).get(INDEX_FILE):
        table.validate(full=True)
    if empty := [name for name in schema.names if table.column(name).null_count]:
        raise DamagedError(f"{where}: column {', '.join(empty)} has empty cells; pack the dataset again")
    return table


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


def _check_texts(where: str, name: str, column: pa.ChunkedArray) -> None:
    """Before a text is written out once for every row that has it."""
    total = 0
    for chunk in column.chunks:
        coded = isinstance(chunk, pa.DictionaryArray)
        texts = chunk.dictionary if coded else chunk
        if not pa.types.is_string(texts.type) and not pa.types.is_large_string(texts.type):
            return  # the cast says whether they can be texts
        lengths = pc.binary_length(texts)
        longest = pc.max(lengths).as_py() or 0
        if longest > MOST_TEXT_BYTES:
            raise DamagedError(f"{where}: column {name} has a text of {longest:,} bytes; {REMEDY}")
        total += pc.sum(lengths.take(chunk.indices) if coded else lengths).as_py() or 0
    if total > USUAL_TEXT_BYTES * len(column) + (1 << 20):
        raise DamagedError(f"{where}: column {name} has {total:,} bytes of text for {len(column):,} rows; {REMEDY}")


def _faults(table: pa.Table, dataset: dict[str, Any]) -> Iterator[str]:
    """What no packing writes, one line a fault."""
    if not table.num_rows:
        return
    for name, (low, high) in INDEX_BOUNDS.items():
        found = pc.min_max(table.column(name)).as_py()
        for value in found.values():
            if not low <= value <= high:
                yield f"column {name} holds {value}, not from {low} to {high}"
    for name in ("camera", "view"):
        highest, count = pc.max(table.column(name)).as_py(), dataset.get(f"{name}s")
        if count is not None and highest >= count:
            yield f"column {name} holds {highest}, but {DATASET_FILE} has {count} {name}s, which count from 0"
    if odd := set(table.column("split").unique().to_pylist()) - set(SPLITS):
        yield f"column split holds {min(odd)!r}, not one of {', '.join(SPLITS)}"
    yield from _shard_faults(table, dataset.get("files", {}))
    yield from _label_faults(table)


def _shard_faults(table: pa.Table, files: dict[str, Any]) -> Iterator[str]:
    names = single(table.column("shard")).dictionary_encode()
    reach = np.zeros(len(names.dictionary), np.int64)
    ends = numpy(single(table.column("offset"))) + numpy(single(table.column("size")))
    np.maximum.at(reach, numpy(names.indices), ends)
    for name, end in zip(names.dictionary.to_pylist(), reach.tolist(), strict=True):
        if not PLAIN_NAME.fullmatch(name):
            yield f"column shard holds {name[:80]!r}, which is no name of a file"
        elif name in files and end > files[name]["bytes"]:
            yield f"an image of {name} ends at byte {end}, the shard has {files[name]['bytes']}"


def _label_faults(table: pa.Table) -> Iterator[str]:
    labels = numpy(single(table.column("label")))
    splits = single(table.column("split")).dictionary_encode()
    is_train = np.array([name == "train" for name in splits.dictionary.to_pylist()])[numpy(splits.indices)]
    if (labels[~is_train] != -1).any():
        yield "column label holds others than -1 outside of train"
    mine = labels[is_train]
    if not len(mine):
        return
    if mine.min() < 0 or mine.max() >= len(mine) or not np.bincount(mine).all():
        yield "column label does not count the training identities 0, 1, ... without gaps"
        return
    names = single(table.column("identity")).dictionary_encode()
    own = numpy(names.indices)[is_train]
    pairs = np.unique(mine * len(names.dictionary) + own)
    if len(pairs) != mine.max() + 1 or len(pairs) != len(np.unique(own)):
        yield "column label gives one identity several labels, or one label several identities"


def single(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece, without a copy where it is in one piece."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def numpy(values: pa.Array) -> np.ndarray:
    """Numbers without nulls as they lie in memory. (`to_numpy` imports pandas first, for half a second.)"""
    data = np.frombuffer(values.buffers()[1], values.type.to_pandas_dtype())
    return data[values.offset : values.offset + len(values)]
