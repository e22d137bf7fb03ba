"""Features of large sets: a folder of Parquet files, which hold the arrays of a feature file part by part.

    extract ──▶ [feature parts] ──▶ feature_file ──▶ metrics

A folder NAME.parquet holds part-00000.parquet, part-00001.parquet, … of PART_ROWS images each, in index order, however
many workers extracted them, and the parts' checksums. Other programs read it as one table. Beside the features no more
than a part is held.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import ConfigError
from shards.leftovers import remove_leftovers, working_name
from shards.sealed import SealError, seal, unseal
from shards.storage import naming, sync, sync_folder, write_json

SUFFIX = ".parquet"
"""Of the folder and of the files in it."""
CHECKSUMS = "_checksums.json"
"""Of the parts. Programs that read such a folder as one table pass over names with this beginning."""
PART_ROWS = 32_768
FEATURES = "features"
MOST_ROWS = 1 << 32


def write_parts(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays [n] and `features` float32 [n, D], which may be memory-mapped. The folder appears when it is complete."""
    strings = [name for name, values in arrays.items() if values.dtype.kind == "U"]
    hashes = {}
    with _folder_atomic(folder) as working:
        for number, start in enumerate(range(0, len(arrays[FEATURES]), PART_ROWS)):
            rows = slice(start, start + PART_ROWS)
            table = pa.table({name: _column(values[rows]) for name, values in arrays.items()})
            path = working / f"part-{number:05d}{SUFFIX}"
            pq.write_table(table, path, compression="zstd", use_dictionary=strings)
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
                sync(file.fileno())
        write_json(str(working / CHECKSUMS), seal(hashes))


def read_parts(folder: Path) -> dict[str, np.ndarray]:
    """The arrays that `write_parts` wrote. Raises ConfigError naming the file that is no part or fits no other."""
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    if not paths:
        raise ConfigError(f"{folder}: holds no files *{SUFFIX}; give a folder that extract.py wrote")
    _check_hashes(folder)
    files = [_open(path) for path in paths]
    schema = files[0].schema_arrow
    for path, file in zip(paths, files, strict=True):
        if not file.schema_arrow.equals(schema):
            raise ConfigError(f"{path}: has other columns than {paths[0].name}; extract again into a new folder")
    total = sum(file.metadata.num_rows for file in files)
    if total > MOST_ROWS:
        raise ConfigError(f"{folder}: is to hold {total:,} images, more than {MOST_ROWS:,}; extract again")
    arrays = {}
    if FEATURES in schema.names:
        kind = schema.field(FEATURES).type
        if not pa.types.is_fixed_size_list(kind):
            raise ConfigError(f"{paths[0]}: features is {kind}, needed are lists of numbers of one fixed length")
        arrays[FEATURES] = np.empty((total, kind.list_size), np.float32)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in schema.names if name not in arrays}
    start = 0
    for path, file in zip(paths, files, strict=True):
        table = _read(path, file)
        for name, blocks in columns.items():
            blocks.append(_plain(table[name]))
        if arrays:
            if table[FEATURES].null_count:
                raise ConfigError(f"{folder}: has images without features; extract again")
            rows = table[FEATURES].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            arrays[FEATURES][start:][: len(table)] = rows.reshape(len(table), -1)
        start += len(table)
    return arrays | {name: np.concatenate(blocks) for name, blocks in columns.items()}


def _check_hashes(folder: Path) -> None:
    """Raises ConfigError where a file of ours is not there or not as it was written. Files that nobody listed are read
    as they are: others write such folders too."""
    try:
        hashes = unseal((folder / CHECKSUMS).read_bytes())
    except FileNotFoundError:
        return
    except SealError as error:
        raise ConfigError(f"{folder / CHECKSUMS}: {error}; extract again") from None
    for name, expected in hashes.items():
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise ConfigError(f"{folder / name}: no such file, but {CHECKSUMS} lists it; extract again") from None
        if found != expected:
            raise ConfigError(f"{folder / name}: is damaged, its checksum differs from {CHECKSUMS}'s; extract again")


@contextmanager
def _folder_atomic(folder: Path) -> Iterator[Path]:
    """As `write_atomic` for a file: a folder to fill, which gets its name when the block ends without an exception."""
    remove_leftovers(folder.parent, folder.name)
    working = folder.parent / working_name(folder.name)
    working.mkdir()
    try:
        with naming(folder):
            yield working
        sync_folder(working)
        working.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise


def _plain(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers, or strings as NumPy's own type; an empty cell is unknown: -1 or an empty string."""
    if pa.types.is_dictionary(column.type) or pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if column.null_count and pa.types.is_integer(column.type):
        column = column.cast(pa.int64()).fill_null(-1)
    elif column.null_count and (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        column = column.fill_null("")
    values = column.to_numpy()
    return values.astype(str) if values.dtype == object else values


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: is not a complete Parquet file ({reason}); extract again") from None


def _read(path: Path, file: pq.ParquetFile) -> pa.Table:
    try:
        return file.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path}: is damaged ({reason}); extract again") from None


def _column(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])
