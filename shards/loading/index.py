"""What lies in the shards, row by row, without opening one of them.

    build ──▶ dataset.json + index.parquet ──▶ [index] ──▶ pk_sampler, PK loader, tar images, evaluation

In:  the folder that `launch/pack.py build` wrote, any fsspec URL.
Out: `SplitIndex`, one numpy array per column and one row per image; its pixels stay in the tar files.

All processes of a node map one decoded copy of the index (`index_file.py`); a column is read when it is used.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from shards.dataset_file import read_dataset_json
from shards.errors import DataError
from shards.format import TAR_BLOCK
from shards.index_table import arrow
from shards.loading.cache import node_cache_dir
from shards.loading.index_file import IndexFile
from shards.source import ShardSource


class Names(Sequence[str]):
    """Strings side by side in memory, each a Python object only when it is asked for: a million of them as a list would
    be 70 MB in every process that holds it."""

    def __init__(self, values: pa.LargeStringArray):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> "Names": ...
    def __getitem__(self, number: int | slice) -> "str | Names":
        found = self.values[number]
        return Names(found) if isinstance(number, slice) else found.as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self.values.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # as lists have none


class ShardIndex:
    """A packed dataset: its facts (`dataset.json`) and its splits."""

    def __init__(self, source: ShardSource, facts: dict, cache_dir: str | None):
        self.source, self.facts, self.cache_dir = source, facts, cache_dir
        self.file = IndexFile(source, facts, node_cache_dir(cache_dir) / "index")
        self.address = self.file.address
        self.url: str = source.url
        self.name: str = facts["name"]
        self.noun: str = facts["noun"]
        self.cameras: int = facts["cameras"]
        self.views: int = facts["views"]
        self.fingerprint: str = facts["fingerprint"]
        self.splits: dict[str, dict] = facts["splits"]
        self.files: dict[str, dict] = facts.get("files", {})

    def __len__(self) -> int:
        """Images of all splits."""
        return sum(stop - start for start, stop in self.file.splits.values())

    @classmethod
    def open(cls, url: str, cache_dir: str | None = None) -> "ShardIndex":
        """Read `dataset.json`, map the index, and check that what it lists is there.

        cache_dir: folder of this node, see `node_cache_dir`.
        Raises DataError for a missing or unfinished dataset, another format, or files that do not fit each other.
        """
        source = ShardSource(url)
        facts = read_dataset_json(url)
        index = cls(source, facts, cache_dir)
        if source.local_root is not None:
            index._check_local_shards(source.local_root)
        return index

    @cached_property
    def identities(self) -> Names:
        """All identities of all splits, sorted; `identity_codes` of every split are numbers into this list, or -1."""
        return Names(self.file.names("identity"))

    @cached_property
    def shard_names(self) -> list[str]:
        return self.file.names("shard").to_pylist()

    @property
    def split_names(self) -> list[str]:
        return list(self.file.splits)

    def split(self, name: str) -> "SplitIndex":
        """Raises DataError when the dataset has no such split, or an empty one."""
        if name not in self.file.splits:
            raise DataError(f"{self.url} has no split {name!r}; it has: {', '.join(self.split_names)}")
        return SplitIndex(self, name)

    def shard_bytes(self, name: str) -> int:
        """Length of a shard: as `dataset.json` says, else up to its last image, padding included."""
        return self.files[name]["bytes"] if name in self.files else self._shard_ends[name]

    @cached_property
    def _shard_ends(self) -> dict[str, int]:
        ends = np.zeros(len(self.shard_names), np.int64)
        np.maximum.at(ends, self.file.column("shard"), self.file.column("offset") + self.file.column("size"))
        return dict(zip(self.shard_names, (-(-ends // TAR_BLOCK) * TAR_BLOCK).tolist(), strict=True))

    def _check_local_shards(self, root: Path) -> None:
        """Every listed shard is there and as long as it was packed."""
        for name in self.shard_names:
            path, expected = root / name, self.shard_bytes(name)
            length = path.stat().st_size if path.is_file() else None
            if length is None:
                raise DataError(f"{path}: no such file, but the index lists its images; copy it again or re-pack")
            if length < expected:
                raise DataError(
                    f"{path}: {length} bytes, but it was packed with {expected}; the copy was cut short: copy it "
                    "again or re-pack"
                )


class SplitIndex:
    """The rows of one split in index order, which is their order in the tar files. Arrays have n entries.

    Pickles as its address: another process maps the same file again.
    """

    def __init__(self, index: ShardIndex, name: str):
        self.index, self.name = index, name
        self._rows = slice(*index.file.splits[name])

    def __len__(self) -> int:
        return self._rows.stop - self._rows.start

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.index.url, self.index.cache_dir, self.index.fingerprint, self.name)

    @property
    def shard_names(self) -> list[str]:
        """File names of the dataset's shards; `shard` counts into this list."""
        return self.index.shard_names

    @property
    def identities(self) -> Names:
        """Identities of the whole dataset, sorted; `identity_codes` count into this list."""
        return self.index.identities

    @cached_property
    def shard(self) -> np.ndarray:
        """int32, numbers into `shard_names`."""
        return self._column("shard")

    @cached_property
    def identity_codes(self) -> np.ndarray:
        """int64, numbers into `identities`; equal codes are equal identities, across splits too. -1 is unknown."""
        codes, unknown = self._column("identity"), self.index.file.unknown_identities
        return np.where(np.isin(codes, unknown), -1, codes) if unknown else codes

    @cached_property
    def labels(self) -> np.ndarray:
        """int64, 0 ... N-1 in train and -1 elsewhere."""
        return self._column("label")

    @cached_property
    def cameras(self) -> np.ndarray:
        """int64, -1 is unknown."""
        return self._column("camera")

    @cached_property
    def views(self) -> np.ndarray:
        """int64, -1 is unknown."""
        return self._column("view")

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64, where the image's bytes start in its shard."""
        return self._column("offset")

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64, bytes."""
        return self._column("size")

    @cached_property
    def crc32(self) -> np.ndarray:
        """uint32, of the image's bytes."""
        return self._column("crc32")

    @cached_property
    def keys(self) -> np.ndarray:
        """Strings; unique in the split."""
        return np.array(self._keys.to_pylist(), dtype=object)

    @cached_property
    def identity(self) -> np.ndarray:
        """Strings, as in the source."""
        return self._strings("identity")

    @cached_property
    def times(self) -> np.ndarray:
        """Strings, empty when unknown."""
        return self._strings("time")

    @cached_property
    def lists(self) -> np.ndarray:
        """Strings: VehicleID's test lists that hold the image ("800,1600"), else empty."""
        return self._strings("lists")

    @cached_property
    def num_identities(self) -> int:
        codes = self.identity_codes
        return int(np.count_nonzero(np.bincount(codes[codes >= 0])))

    @cached_property
    def label_names(self) -> Names:
        """The identity behind each label 0 ... N-1; empty outside train."""
        rows = first_places(self.labels, int(self.labels.max(initial=-1)) + 1)
        return Names(self.identities.values.take(arrow(self.identity_codes[rows[rows >= 0]])))

    def key(self, row: int) -> str:
        """One key, without decoding all of them."""
        return self._keys[int(row)].as_py()

    def identity_of(self, row: int) -> str:
        """One identity as in the source, likewise."""
        return self.identities[int(self._column("identity")[row])]

    def where(self, row: int) -> str:
        """How errors name an image: its shard and key."""
        return f"shard {self.shard_names[self.shard[row]]}, key {self.key(row)}"

    @cached_property
    def _keys(self) -> pa.LargeStringArray:
        return self.index.file.keys()[self._rows]

    def _column(self, name: str) -> np.ndarray:
        return self.index.file.column(name)[self._rows]

    def _strings(self, column: str) -> np.ndarray:
        """A column of NAMED, of objects: every row refers to one of few strings."""
        return np.array(self.index.file.names(column).to_pylist(), dtype=object)[self._column(column)]


def _reopen(url: str, cache_dir: str | None, fingerprint: str, name: str) -> SplitIndex:
    index = ShardIndex.open(url, cache_dir)
    if index.fingerprint != fingerprint:
        raise DataError(f"{url}: the dataset was packed anew while it was in use; start the run again")
    return index.split(name)


def first_places(values: np.ndarray, size: int) -> np.ndarray:
    """Where each of 0 … size-1 is first in `values`, int64 [size]; -1 where it is not. Numbers below 0 do not count."""
    first = np.full(size + 1, -1)
    first[values[::-1]] = np.arange(len(values))[::-1]  # of equal numbers the last one stays; -1 is the last place
    return first[:size]
