"""Feature files (.npz): written by extract, evaluated by evaluate; also those of any other model.

    extract ──▶ [feature file] ──▶ metrics

An extraction holds `features` float32 [n, D], `identities`, `keys`, `splits`, `lists`, `times` (strings [n]), `cameras`
and `views` (int64 [n]), in index order; -1 and empty are unknown, and equal nothing. To be evaluated, a file has two
such sets, their names beginning with `query_` and `gallery_`, or two files have one each. Large sets are folders of
parts instead, see feature_parts.
Imports no torch, so that mistakes show at once.
"""

import errno
import math
import os
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipreid.retrieval.rules import RULES, Rule
from cluster.errors import ConfigError
from cluster.evaluation import feature_parts
from shards.errors import DataError
from shards.storage import local_path, open_read, write_atomic

CHUNK_BYTES = 1 << 24
ARRAY_START = b"\x93NUMPY"
"""Of an .npy file."""
PREFIXES = ("query_", "gallery_")


@dataclass(frozen=True)
class FeatureSet:
    """One set of a feature file: images with their features and what is known of them."""

    source: str
    """File and array, for messages."""
    features: np.ndarray
    """Numbers [n, D]; memory-mapped where the file allows it."""
    identities: np.ndarray
    """[n], strings or integers."""
    cameras: np.ndarray | None = None
    times: np.ndarray | None = None
    lists: np.ndarray | None = None
    splits: np.ndarray | None = None
    keys: np.ndarray | None = None


def write_features(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A file, or for NAME.parquet a folder of parts. It appears under its name only when it is complete."""
    if path.suffix == feature_parts.SUFFIX:
        feature_parts.write_parts(path, arrays)
        return
    with write_atomic(str(path)) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_pair(paths: list[str], rule: Rule) -> tuple[FeatureSet, FeatureSet]:
    """Query and gallery from one file with prefixed arrays, or from two extractions in this order.

    Raises ConfigError naming the file and the arrays that are missing, or that do not fit each other.
    """
    needed = ("features", "identities", *RULES[rule])
    hint = " (cameras and times are not needed with --rule none)" if rule != "none" else ""
    if len(paths) == 1:
        query, gallery = _read(paths[0], needed, PREFIXES, hint)
        where = f"{paths[0]}: query_features", "gallery_features"
    else:
        (query,), (gallery,) = (_read(path, needed, ("",), hint) for path in paths)
        where = f"{paths[0]}: features", f"those of {paths[1]}"
        if _is_split(query, "gallery") and _is_split(gallery, "query"):
            raise ConfigError(f"--features: {paths[0]} is the gallery and {paths[1]} the query: give the query first")
    widths = query.features.shape[1], gallery.features.shape[1]
    if widths[0] != widths[1]:
        raise ConfigError(
            f"{where[0]} have {widths[0]} values an image, {where[1]} {widths[1]}: extract both with the same weights"
        )
    kinds = query.identities.dtype.kind, gallery.identities.dtype.kind
    if kinds[0] != kinds[1]:
        words = {"U": "strings", "i": "integers"}
        raise ConfigError(
            f"{paths[0]}: the identities of the queries are {words[kinds[0]]}, those of the gallery {words[kinds[1]]}: "
            "write both alike"
        )
    return query, gallery


def read_test(path: str) -> FeatureSet:
    """An extraction of VehicleID's split test. Raises as `read_pair`."""
    return _read(path, ("features", "identities", "lists"), ("",), " (give an extraction of split test)")[0]


def _is_split(file: FeatureSet, name: str) -> bool:
    return file.splits is not None and bool((file.splits == name).all())


def _read(path: str, needed: tuple[str, ...], prefixes: tuple[str, ...], hint: str) -> list[FeatureSet]:
    if Path(path).suffix == feature_parts.SUFFIX:
        return _read_sets(path, feature_parts.read_parts(Path(path)), needed, prefixes, hint)
    try:
        with open_read(path) as file:
            if file.read(len(ARRAY_START)) == ARRAY_START:
                raise ConfigError(f"{path}: holds one array without a name; write an .npz with numpy.savez")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                assert arrays.zip is not None, "it is open"
                _check_members(path, arrays.zip)
                return _read_sets(path, arrays, needed, prefixes, hint)
    except FileNotFoundError:
        raise ConfigError(f"--features {path}: no such file") from None
    except (ConfigError, DataError, PermissionError):
        raise
    except Exception as error:  # zipfile, zlib, numpy, its parser of headers: each raises what it comes across
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.EIO):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(f"{path}: is not a complete .npz file of plain arrays ({said}); write it again") from None


def _check_members(path: str, archive: zipfile.ZipFile) -> None:
    """Before memory is taken: every member is as long as its header says. Raises ConfigError."""
    twice = [name for name, count in Counter(archive.namelist()).items() if count > 1]
    if twice:
        raise ConfigError(f"{path}: holds {twice[0][:80]!a} twice; write it again")
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        with archive.open(member) as data:
            version = np.lib.format.read_magic(data)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(data)
            held, needed = member.file_size - data.tell(), math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ConfigError(f"{path}: {name} holds Python objects, which are not read; write numbers or strings")
        if held != needed or min(shape, default=0) < 0:  # others' bytes would be read
            raise ConfigError(
                f"{path}: {name} holds {held:,} bytes, but its header says {dtype} {shape}, {needed:,} bytes: write it "
                "again"
            )


def _read_sets(
    path: str, arrays: Mapping[str, np.ndarray], needed: tuple[str, ...], prefixes: tuple[str, ...], hint: str
) -> list[FeatureSet]:
    missing = [prefix + name for prefix in prefixes for name in needed if prefix + name not in arrays]
    if missing:
        raise ConfigError(f"{path}: lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}{hint}")
    return [_read_set(path, arrays, prefix) for prefix in prefixes]


def _read_set(path: str, arrays: Mapping[str, np.ndarray], prefix: str) -> FeatureSet:
    features = _mapped(path, arrays, f"{prefix}features")
    if features.ndim != 2 or features.dtype.kind not in "fiu" or not features.size:
        raise ConfigError(
            f"{path}: {prefix}features is {features.dtype} {features.shape}, needed are numbers [images, values]"
        )
    columns = {}
    for name, kinds, words in (
        ("identities", "USiu", "strings or integers"),
        ("cameras", "iu", "integers"),
        ("times", "US", "strings"),
        ("lists", "US", "strings"),
        ("splits", "US", "strings"),
        ("keys", "US", "strings"),
    ):
        if prefix + name not in arrays:
            continue
        column = arrays[prefix + name]
        if column.dtype.kind not in kinds or column.shape != (len(features),):
            raise ConfigError(
                f"{path}: {prefix}{name} is {column.dtype} {column.shape}, needed are {words} ({len(features)},), "
                f"one for each row of {prefix}features"
            )
        columns[name] = column.astype(np.int64 if column.dtype.kind in "iu" else str)
    return FeatureSet(f"{path}: {prefix}features", features, **columns)


def _mapped(path: str, arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The array, mapped into memory where it lies uncompressed in a local file, and read where not."""
    local, member = local_path(path), f"{name}.npy"
    if not isinstance(arrays, np.lib.npyio.NpzFile) or arrays.zip is None or local is None:
        return arrays[name]
    if member not in arrays.zip.namelist() or arrays.zip.getinfo(member).compress_type != zipfile.ZIP_STORED:
        return arrays[name]
    with arrays.zip.open(member) as data:  # Once through, since a map does not compare the checksum.
        while data.read(CHUNK_BYTES):
            pass
    info = arrays.zip.getinfo(member)
    with local.open("rb") as file:
        file.seek(info.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # behind the name and the extra field
        if np.lib.format.read_magic(file) != (1, 0):
            return arrays[name]
        shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
        if by_column or dtype.hasobject or not math.prod(shape):
            return arrays[name]
        return np.memmap(local, dtype, "r", file.tell(), shape)
