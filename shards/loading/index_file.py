"""index.parquet, checked, and decoded once per node.

    build ──▶ index.parquet ──▶ [index file] ──▶ index

The Parquet file becomes a file of plain arrays in the node's cache, which every process of the node maps: an index of
millions of images is in memory once and opens in milliseconds.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.errors import DamagedError, DataError
from shards.format import DATASET_FILE, INDEX_FILE
from shards.index_table import arrow, index_columns, numpy, single
from shards.leftovers import remove_leftovers
from shards.loading.array_file import ArrayFile, ArrayWriter, DamagedFile
from shards.private import open_own, private_folder
from shards.records import UNKNOWN_IDENTITIES
from shards.source import ShardSource
from shards.storage import write_atomic

KEPT_DAYS = 30
NAMED = {"shard": np.int32, "identity": np.int64, "time": np.int32, "lists": np.int32}
"""Strings that repeat, as codes into their different values: type of the codes. Shards and identities are sorted."""
NUMBERS = {
    **dict.fromkeys(("offset", "size", "label", "camera", "view"), np.int64),  # as torch takes them
    "crc32": np.uint32,
}
Values = TypeVar("Values")


def address(source: ShardSource, facts: dict) -> str:
    """Names this packing at this place, for what the node's cache keeps of it."""
    try:
        state = source.state(INDEX_FILE)
    except FileNotFoundError as error:
        raise DamagedError(f"{source.where(INDEX_FILE)}: no such file; copy it again or re-pack") from error
    return hashlib.sha256(json.dumps([source.url, facts, state]).encode()).hexdigest()[:32]


class IndexFile:
    """The node's copy of an index: columns of NAMED and NUMBERS, and `key`; row after row, split after split.

    It is made when this index was not seen before, and made anew where it is damaged, which shows when it is opened
    or when a column is first used. Copies that nobody opened for KEPT_DAYS make room for a new one.
    """

    def __init__(self, source: ShardSource, facts: dict, folder: Path):
        """folder: of all copies of this node. Raises DataError."""
        self.source, self.facts = source, facts
        self.address = address(source, facts)
        self.path = folder / f"{self.address}.arrays"
        self._file = self._opened(None)

    @property
    def splits(self) -> dict[str, tuple[int, int]]:
        """First row, and the one after the last, of each split; by name."""
        return {name: (start, stop) for name, (start, stop) in self._file.facts["splits"].items()}

    @property
    def unknown_identities(self) -> list[int]:
        """Codes of what stands for no identity."""
        return self._file.facts["unknown"]

    def column(self, name: str) -> np.ndarray:
        """Numbers, or the codes of a column of NAMED."""
        return self._sound(lambda file: file.array(name))

    def names(self, column: str) -> pa.LargeStringArray:
        """What the codes of a column of NAMED stand for."""
        return self._sound(lambda file: file.strings(f"{column}.names"))

    def keys(self) -> pa.LargeStringArray:
        return self._sound(lambda file: file.strings("key"))

    def _sound(self, read: Callable[[ArrayFile], Values]) -> Values:
        try:
            return read(self._file)
        except DamagedFile:
            self._file = self._opened(self._file)
        try:
            return read(self._file)
        except DamagedFile as error:
            raise DataError(
                f"data.cache_dir: {error}, though it was written just now; its disk or the memory is faulty: give "
                "another folder"
            ) from error

    def _opened(self, damaged: ArrayFile | None) -> ArrayFile:
        """The copy, made where there is none but the damaged one: by one process, while the others wait for it."""
        if found := self._found(damaged):
            return found
        folder = self.path.parent
        try:
            private_folder(folder, "remove it, or give another folder as data.cache_dir")
            with _alone(folder.with_suffix(".lock")):
                if found := self._found(damaged):
                    return found
                with write_atomic(str(self.path), durable=False) as file:  # it has checksums
                    self._write(file)
                _remove_unused(folder)
                return ArrayFile(self.path)
        except (OSError, DamagedFile) as error:
            raise DataError(f"data.cache_dir: can't write {folder} ({error}); give another folder") from error

    def _found(self, damaged: ArrayFile | None) -> ArrayFile | None:
        try:
            found = ArrayFile(self.path)
        except (OSError, DamagedFile):
            return None
        if found.facts["address"] != self.address or (damaged and found.is_same(damaged)):
            return None
        self.path.touch()
        return found

    def _write(self, file: IO[bytes]) -> None:
        """Decode index.parquet, column after column. Raises DamagedError where it is not what dataset.json lists."""
        if address(self.source, self.facts) != self.address:
            raise DataError(f"{self.source.url}: the dataset was packed anew while it was in use; start the run again")
        where = self.source.where(INDEX_FILE)
        columns = index_columns(where, self.source.read(INDEX_FILE), self.facts, coded=("split", *NAMED))
        splits, order = _splits(where, self.facts, *_codes_and_names(columns["split"], in_order=True))
        writer = ArrayWriter(file)
        unknown: list[int] = []
        for name, kind in NAMED.items():
            codes, names = _codes_and_names(columns[name], in_order=name in ("shard", "identity"))
            writer.add(name, codes[order].astype(kind, copy=False))
            writer.add_strings(f"{name}.names", names)
            if name == "identity":
                identities = enumerate(names.to_pylist())
                unknown = [code for code, identity in identities if identity.strip() in UNKNOWN_IDENTITIES]
        for name, kind in NUMBERS.items():
            writer.add(name, numpy(single(columns[name]))[order].astype(kind, copy=False))
        keys = single(columns["key"].cast(pa.large_string()))  # of all images together they may exceed 2 GB
        writer.add_strings("key", keys if isinstance(order, slice) else keys.take(arrow(order)))
        writer.finish({"address": self.address, "splits": splits, "unknown": unknown})


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process of the node at a time, where the file system has locks."""
    with open_own(lock, os.O_RDWR | os.O_CREAT) as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_unused(folder: Path) -> None:
    """A file that other processes have mapped stays theirs."""
    remove_leftovers(folder)
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process is at it too
            if time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
                path.unlink()


def _splits(
    where: str, facts: dict, codes: np.ndarray, names: pa.LargeStringArray
) -> tuple[dict[str, tuple[int, int]], slice | np.ndarray]:
    """First row and the one after the last of each split, and the order of rows in which they are neighbours."""
    counts = np.bincount(codes, minlength=len(names)).tolist()
    of_split = dict(zip(names.to_pylist(), counts, strict=True))
    _check_counts(where, facts, of_split)
    begins = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist()]
    if len(begins) == len(names):
        in_order = {names[int(codes[begin])].as_py(): begin for begin in begins}
        return {name: (begin, begin + of_split[name]) for name, begin in sorted(in_order.items())}, slice(None)
    stops = np.cumsum(counts).tolist()
    splits = {name: (stop - of_split[name], stop) for name, stop in zip(of_split, stops, strict=True)}
    return splits, np.argsort(codes, kind="stable")


def _check_counts(where: str, facts: dict, counts: dict[str, int]) -> None:
    if not counts:
        raise DamagedError(f"{where}: lists no images; pack the dataset again")
    listed = {name: split["images"] for name, split in facts["splits"].items() if split["images"]}
    if counts != listed:
        raise DamagedError(
            f"{where}: lists {_counts(counts)}, {DATASET_FILE} says {_counts(listed)}; the two files come from two "
            "packings: copy both again or re-pack"
        )


def _counts(images: dict[str, int]) -> str:
    return ", ".join(f"{images[name]} {name}" for name in sorted(images)) or "no"


def _codes_and_names(column: pa.ChunkedArray, in_order: bool) -> tuple[np.ndarray, pa.LargeStringArray]:
    """A coded column as int32 codes into its different values; in_order: these are sorted."""
    coded = single(column.unify_dictionaries())
    codes, names = numpy(coded.indices), coded.dictionary.cast(pa.large_string())
    used = np.bincount(codes, minlength=len(names)) > 0  # a dictionary may hold more
    order = numpy(pc.sort_indices(names)).astype(np.int64) if in_order else np.arange(len(names))
    order = order[used[order]]
    if np.array_equal(order, np.arange(len(names))):
        return codes, names
    rank = np.empty(len(names), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank[codes], names.take(arrow(order))
