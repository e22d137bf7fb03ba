"""What lies in the shards, row by row, without opening one of them.

    build ──▶ dataset.json + index.parquet ──▶ [index] ──▶ pk_sampler, PK loader, tar images, evaluation

In:  the folder that `launch/pack.py build` wrote, any fsspec URL.
Out: `SplitIndex`, one numpy array per column and one row per image; its pixels stay in the tar files.

All processes of a node map one decoded copy of the index (`index_file.py`); a column is decoded when it is used.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.dataset_file import read_dataset_json
from shards.errors import DataError
from shards.format import TAR_BLOCK
from shards.index_table import numpy, single
from shards.loading.cache import node_cache_dir
from shards.loading.index_file import address, open_table
from shards.records import UNKNOWN_IDENTITIES
from shards.source import ShardSource


class ShardIndex:
    """A packed dataset: its facts (`dataset.json`) and its splits."""

    def __init__(self, source: ShardSource, facts: dict, address: str, cache_dir: str | None):
        self.source, self.facts, self.address, self.cache_dir = source, facts, address, cache_dir
        self.table = open_table(source, facts, node_cache_dir(cache_dir) / "index" / f"{address}.arrow")
        self.url: str = source.url
        self.name: str = facts["name"]
        self.noun: str = facts["noun"]
        self.cameras: int = facts["cameras"]
        self.views: int = facts["views"]
        self.fingerprint: str = facts["fingerprint"]
        self.splits: dict[str, dict] = facts["splits"]
        self.files: dict[str, dict] = facts.get("files", {})

    @classmethod
    def open(cls, url: str, cache_dir: str | None = None) -> "ShardIndex":
        """Read `dataset.json`, map the index, and check that what it lists is there.

        cache_dir: folder of this node; None is a folder of this user below the system's temporary one.
        Raises DataError for a missing or unfinished dataset, another format, or files that do not fit each other.
        """
        source = ShardSource(url)
        facts = read_dataset_json(url)
        index = cls(source, facts, address(source, facts), cache_dir)
        if source.local_root is not None:
            index._check_local_shards(source.local_root)
        return index

    @cached_property
    def identities(self) -> list[str]:
        """All identities of all splits, sorted; `identity_codes` of every split are numbers into this list, or -1."""
        return self._dictionary("identity").to_pylist()

    @cached_property
    def shard_names(self) -> list[str]:
        return self._dictionary("shard").to_pylist()

    @cached_property
    def split_names(self) -> list[str]:
        return self._dictionary("split").to_pylist()

    def split(self, name: str) -> "SplitIndex":
        """Raises DataError when the dataset has no such split, or an empty one."""
        if name not in self.split_names:
            raise DataError(f"{self.url} has no split {name!r}; it has: {', '.join(self.split_names)}")
        rows = np.flatnonzero(self._codes("split") == self.split_names.index(name))
        contiguous = rows[-1] - rows[0] + 1 == len(rows)
        table = self.table.slice(rows[0], len(rows)) if contiguous else self.table.take(rows)
        return SplitIndex(self, name, table)

    def shard_bytes(self, name: str) -> int:
        """Length of a shard: as `dataset.json` says, else up to its last image, padding included."""
        if name in self.files:
            return self.files[name]["bytes"]
        return int(self._shard_ends[self.shard_names.index(name)])

    @cached_property
    def _shard_ends(self) -> np.ndarray:
        ends = np.zeros(len(self.shard_names), np.int64)
        np.maximum.at(ends, self._codes("shard"), _numpy(self.table, "offset") + _numpy(self.table, "size"))
        return -(-ends // TAR_BLOCK) * TAR_BLOCK

    def _dictionary(self, column: str) -> pa.Array:
        return self.table.column(column).chunk(0).dictionary

    def _codes(self, column: str) -> np.ndarray:
        return numpy(self.table.column(column).chunk(0).indices)

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

    def __init__(self, index: ShardIndex, name: str, table: pa.Table):
        self.index, self.name, self.table = index, name, table

    def __len__(self) -> int:
        return self.table.num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.index.url, self.index.cache_dir, self.index.fingerprint, self.name)

    @property
    def shard_names(self) -> list[str]:
        """File names of the dataset's shards; `shard` counts into this list."""
        return self.index.shard_names

    @property
    def identities(self) -> list[str]:
        """Identities of the whole dataset, sorted; `identity_codes` count into this list."""
        return self.index.identities

    @cached_property
    def shard(self) -> np.ndarray:
        """int32, numbers into `shard_names`."""
        return self._codes("shard")

    @cached_property
    def identity_codes(self) -> np.ndarray:
        """int64, numbers into `identities`; equal codes are equal identities, across splits too. -1 is unknown."""
        codes = self._codes("identity").astype(np.int64)
        unknown = [code for code, name in enumerate(self.identities) if name.strip() in UNKNOWN_IDENTITIES]
        return np.where(np.isin(codes, unknown), -1, codes) if unknown else codes

    @cached_property
    def labels(self) -> np.ndarray:
        """int64, 0 ... N-1 in train and -1 elsewhere."""
        return _numpy(self.table, "label")

    @cached_property
    def cameras(self) -> np.ndarray:
        """int64, -1 is unknown."""
        return _numpy(self.table, "camera")

    @cached_property
    def views(self) -> np.ndarray:
        """int64, -1 is unknown."""
        return _numpy(self.table, "view")

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64, where the image's bytes start in its shard."""
        return _numpy(self.table, "offset")

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64, bytes."""
        return _numpy(self.table, "size")

    @cached_property
    def crc32(self) -> np.ndarray:
        """uint32, of the image's bytes."""
        return _numpy(self.table, "crc32")

    @cached_property
    def keys(self) -> np.ndarray:
        """Strings; unique in the split."""
        return self._strings("key")

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
        return len(np.unique(self.identity_codes[self.identity_codes >= 0]))

    @cached_property
    def label_names(self) -> list[str]:
        """The identity behind each label 0 ... N-1; empty outside train."""
        labels, rows = np.unique(self.labels, return_index=True)
        return [self.identities[code] for code in self.identity_codes[rows[labels >= 0]]]

    def key(self, row: int) -> str:
        """One key, without decoding all of them."""
        return self.table.column("key")[int(row)].as_py()

    def where(self, row: int) -> str:
        """How errors name an image: its shard and key."""
        return f"shard {self.shard_names[self.shard[row]]}, key {self.key(row)}"

    def _codes(self, column: str) -> np.ndarray:
        return numpy(single(self.table.column(column)).indices)

    def _strings(self, column: str) -> np.ndarray:
        values = single(self.table.column(column))
        if isinstance(values, pa.DictionaryArray):
            return np.array(values.dictionary.to_pylist(), dtype=object)[numpy(values.indices)]
        return np.array(values.to_pylist(), dtype=object)


def _reopen(url: str, cache_dir: str | None, fingerprint: str, name: str) -> SplitIndex:
    index = ShardIndex.open(url, cache_dir)
    if index.fingerprint != fingerprint:
        raise DataError(f"{url}: the dataset was packed anew while it was in use; start the run again")
    return index.split(name)


def _numpy(table: pa.Table, column: str) -> np.ndarray:
    return numpy(single(table.column(column)))
