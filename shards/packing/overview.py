"""What a packed dataset holds, in numbers: for `launch/pack.py inspect`.

    dataset.json, index.parquet ──▶ [overview] ──▶ tables

Reads no shard.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.dataset_file import read_dataset_json
from shards.index_table import read_index_table


@dataclass(frozen=True)
class Spread:
    """Least, middle and greatest of some numbers."""

    low: int
    middle: int
    high: int

    @classmethod
    def of(cls, numbers: np.ndarray) -> "Spread":
        return cls(int(numbers.min()), int(np.median(numbers)), int(numbers.max()))

    def __str__(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} – {self.middle:,} – {self.high:,}"


@dataclass(frozen=True)
class SplitOverview:
    """One split. Widths and heights in pixels."""

    name: str
    images: int
    shards: int
    num_bytes: int
    """Of the shards; of the images alone where dataset.json does not list them."""
    images_per_identity: np.ndarray
    """int64 [identities]"""
    images_per_camera: dict[int, int]
    """Camera -> images, -1 for unknown."""
    images_per_view: dict[int, int]
    widths: Spread
    heights: Spread
    image_kb: Spread
    """Thousands of bytes, rounded up."""

    @property
    def identities(self) -> int:
        return len(self.images_per_identity)

    def histogram(self) -> list[tuple[str, int]]:
        """(images of an identity, identities that have so many), in classes that double."""
        classes = np.frexp(self.images_per_identity)[1] - 1  # floor of log2, exactly
        numbers = range(classes.min(), classes.max() + 1)
        counts = np.bincount(classes - classes.min())
        names = [str(1 << n) if n == 0 else f"{1 << n}–{(2 << n) - 1}" for n in numbers]
        return list(zip(names, counts.tolist(), strict=True))


@dataclass(frozen=True)
class Overview:
    """A packed dataset. `dataset` is dataset.json."""

    url: str
    dataset: dict[str, Any]
    splits: list[SplitOverview]

    @classmethod
    def read(cls, url: str) -> "Overview":
        """Raises DataError when there is no dataset, or a damaged one."""
        dataset = read_dataset_json(url)
        table = read_index_table(url, dataset)
        names = table.column("split").to_numpy()
        splits = [
            _split_overview(name, table.filter(names == name), dataset.get("files", {}))
            for name in table.column("split").unique().to_pylist()
        ]
        return cls(url, dataset, splits)


def _split_overview(name: str, table: Any, files: dict[str, dict[str, int]]) -> SplitOverview:
    shards = table.column("shard").unique().to_pylist()
    sizes = table.column("size").to_numpy()
    known = all(shard in files for shard in shards)
    return SplitOverview(
        name=name,
        images=table.num_rows,
        shards=len(shards),
        num_bytes=sum(files[shard]["bytes"] for shard in shards) if known else int(sizes.sum()),
        images_per_identity=table.column("identity").value_counts().field("counts").to_numpy(),
        images_per_camera=_counts(table, "camera"),
        images_per_view=_counts(table, "view"),
        widths=Spread.of(table.column("width").to_numpy()),
        heights=Spread.of(table.column("height").to_numpy()),
        image_kb=Spread.of(-(-sizes // 1000)),
    )


def _counts(table: Any, column: str) -> dict[int, int]:
    numbers, counts = np.unique(table.column(column).to_numpy(), return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))
