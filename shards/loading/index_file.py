"""index.parquet, checked, and decoded once per node.

    build ──▶ index.parquet ──▶ [index file] ──▶ index

The Parquet file becomes an uncompressed Arrow file in the node's cache, which every process of the node maps: an
index of millions of images is in memory once and opens in milliseconds.
"""

import contextlib
import hashlib
import json
import time
import zlib
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc

from shards.errors import DamagedError, DataError
from shards.format import DATASET_FILE, INDEX_FILE, index_schema
from shards.index_table import parse_index, single
from shards.leftovers import remove_leftovers
from shards.source import ShardSource
from shards.storage import write_atomic

KEPT_DAYS = 30
CHECKSUM_BYTES = 4
CODED = ("split", "shard", "identity")  # strings that repeat: kept as int32 codes into a sorted dictionary
NOT_LOADED = ("width", "height")
COLUMNS = pa.schema(
    [
        field.with_type(pa.int64()) if field.type == pa.int32() else field  # so that torch takes them as they are
        for field in index_schema()
        if field.name not in NOT_LOADED
    ]
)


def address(source: ShardSource, facts: dict) -> str:
    """Names this packing at this place, for what the node's cache keeps of it."""
    try:
        state = source.state(INDEX_FILE)
    except FileNotFoundError as error:
        raise DamagedError(f"{source.where(INDEX_FILE)}: no such file; copy it again or re-pack") from error
    return hashlib.sha256(json.dumps([source.url, facts, state]).encode()).hexdigest()[:32]


def open_table(source: ShardSource, facts: dict, path: Path) -> pa.Table:
    """Map the node's decoded copy of the index; make it when this index was not seen before. Raises DataError.

    A copy whose checksum is wrong is made anew. Copies that nobody opened for KEPT_DAYS make room for a new one.
    Columns are COLUMNS, in one chunk; those of CODED are dictionary arrays with sorted dictionaries.
    """
    with contextlib.suppress(OSError, pa.ArrowInvalid):
        mapped = _map(path)
        with contextlib.suppress(PermissionError):  # another user's copy
            path.touch()
        return mapped
    table = _decode(source, facts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomic(str(path), durable=False) as file:  # it has a checksum
            _write(file, table)
        _remove_unused(path.parent)
    except OSError as error:
        raise DataError(f"data.cache_dir: can't write {path.parent} ({error}); give another folder") from error
    return _map(path)


def _remove_unused(folder: Path) -> None:
    """A file that other processes have mapped stays theirs."""
    remove_leftovers(folder)
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process is at it too
            if time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
                path.unlink()


def _write(file: IO[bytes], table: pa.Table) -> None:
    """An Arrow file with its CRC-32 behind it."""
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    file.flush()
    with pa.memory_map(file.name) as written:
        checksum = zlib.crc32(written.read_buffer())
    file.write(checksum.to_bytes(CHECKSUM_BYTES))


def _map(path: Path) -> pa.Table:
    """Raises OSError where there is no such file, ArrowInvalid where it is damaged."""
    with pa.memory_map(str(path)) as file:
        data = file.read_buffer()
    content = data.slice(0, max(data.size - CHECKSUM_BYTES, 0))
    if zlib.crc32(content) != int.from_bytes(data.slice(content.size)):
        raise pa.ArrowInvalid(f"{path}: damaged")
    return pa.ipc.open_file(pa.BufferReader(content)).read_all()


def _decode(source: ShardSource, facts: dict) -> pa.Table:
    """index.parquet as one Arrow batch, repeated strings as codes into sorted dictionaries."""
    where = source.where(INDEX_FILE)
    table = parse_index(where, source.read(INDEX_FILE), facts)
    if not table.num_rows:
        raise DamagedError(f"{where}: lists no images; pack the dataset again")
    table = table.select(COLUMNS.names).cast(COLUMNS)
    _check_counts(where, facts, table)
    for name in CODED:
        table = table.set_column(table.column_names.index(name), name, _coded(single(table.column(name))))
    return table.combine_chunks()


def _check_counts(where: str, facts: dict, table: pa.Table) -> None:
    counts = {row["values"]: row["counts"] for row in pc.value_counts(table.column("split")).to_pylist()}
    listed = {name: split["images"] for name, split in facts["splits"].items() if split["images"]}
    if counts != listed:
        raise DamagedError(
            f"{where}: lists {_counts(counts)}, {DATASET_FILE} says {_counts(listed)}; the two files come from two "
            "packings: copy both again or re-pack"
        )


def _counts(images: dict[str, int]) -> str:
    return ", ".join(f"{images[name]} {name}" for name in sorted(images)) or "no"


def _coded(values: pa.Array) -> pa.DictionaryArray:
    encoded = values.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary)
    rank = pc.sort_indices(order).cast(pa.int32())  # sorting a permutation inverts it
    return pa.DictionaryArray.from_arrays(rank.take(encoded.indices), encoded.dictionary.take(order))
