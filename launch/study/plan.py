"""What the study runs: variants of one setting, and the tables of the paper that they stand in.

    [plan] ──▶ runner (a run folder for each variant and seed) ──▶ report

A variant is what differs from `configs/claims.yaml`, which is CLIP-ReID as published in all but size. One variant may
stand in several tables and is run once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Settings = Mapping[str, str]

TWO_STAGE = "two stages"
RAW = "raw CLIP"
"""Weights before any training, which no run is needed for."""
VARIANTS: dict[str, Settings] = {
    TWO_STAGE: {},
    "baseline": {"method": "baseline", "stages": "[2]", "stage2.text_loss": "none"},
    "one stage": {"method": "one_stage", "stages": "[2]", "stage2.text_loss": "i2t+t2i"},
    "no text loss": {"stage2.text_loss": "none"},
    "i2t": {"stage2.text_loss": "i2t"},
    "i2t + t2i": {"stage2.text_loss": "i2t+t2i"},
    "i2tce + t2i": {"stage2.text_loss": "i2tce+t2i"},
    "SIE, class token": {"model.sie": "camera+view"},
    "SIE, all tokens": {"model.sie": "camera+view", "model.sie_tokens": "all"},
    "OLP": {"model.stride": "6"},
    "average features": {"stage1.features": "average"},
    "2 levels": {"stage2.triplet_levels": "2"},
    "M = 1": {"model.prompt_tokens": "1"},
    "M = 8": {"model.prompt_tokens": "8"},
}
DESCRIPTORS: dict[str, str] = {"img": "[img]", "proj": "[proj]", "pre + img + proj": "[pre,img,proj]"}
"""Of Table 11: other features that the finished runs of two stages are evaluated with."""


@dataclass(frozen=True)
class Row:
    """A line of a table: a variant, maybe with other features compared than img and proj."""

    variant: str
    descriptor: str = ""
    """Of DESCRIPTORS; empty: as trained."""
    name: str = ""
    """What the table calls it, where that is not the variant."""

    @property
    def title(self) -> str:
        return self.name or self.descriptor or self.variant


@dataclass(frozen=True)
class Table:
    """One of the paper's tables in small; every row is compared with the published choice."""

    number: str
    title: str
    rows: Sequence[Row]
    published: Row
    seeds: int = 3
    raw: bool = field(default=False)
    """Whether weights before any training are a line too."""


def _rows(*variants: str) -> list[Row]:
    return [Row(variant) for variant in variants]


def _table(number: str, title: str, published: str, *others: str) -> Table:
    """A table whose published row is two stages, under another name."""
    row = Row(TWO_STAGE, name=published)
    return Table(number, title, [row, *_rows(*others)], row)


TABLES = [
    Table("4, 5", "Training", _rows("baseline", "one stage", TWO_STAGE), Row(TWO_STAGE), seeds=5, raw=True),
    _table("6", "Text losses of stage 2", "i2tce", "no text loss", "i2t", "i2t + t2i", "i2tce + t2i"),
    _table("7", "Side information and overlapping patches", "none", "SIE, class token", "SIE, all tokens", "OLP"),
    _table("8", "Features of stage 1", "instance features", "average features"),
    _table("9", "Levels of the triplet loss", "3 levels", "2 levels"),
    _table("10", "Tokens of a prompt", "M = 4", "M = 1", "M = 8"),
    Table(
        "11",
        "Features that are compared",
        [*(Row(TWO_STAGE, descriptor) for descriptor in DESCRIPTORS), Row(TWO_STAGE, name="img + proj")],
        Row(TWO_STAGE, name="img + proj"),
    ),
]


@dataclass(frozen=True)
class PlannedRun:
    """One training and the evaluations of it."""

    variant: str
    seed: int
    descriptors: tuple[str, ...]
    """Of DESCRIPTORS, to be evaluated beside the trained one."""

    @property
    def settings(self) -> list[str]:
        return [*(f"{key}={value}" for key, value in VARIANTS[self.variant].items()), f"run.seed={self.seed}"]

    @property
    def folder(self) -> str:
        """Below the study's folder."""
        return f"{slug(self.variant)}/seed-{self.seed}"


def slug(name: str) -> str:
    """A name as part of a path: "i2t + t2i" is i2t-t2i."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def planned_runs(tables: Sequence[Table], most_seeds: int | None = None) -> list[PlannedRun]:
    """Each variant of the tables with each seed once, all variants of a seed before the next seed."""
    seeds: dict[str, int] = {}
    descriptors: dict[str, set[str]] = {}
    for table in tables:
        for row in (*table.rows, table.published):
            seeds[row.variant] = max(seeds.get(row.variant, 0), _seeds(table, most_seeds))
            descriptors.setdefault(row.variant, set()).update({row.descriptor} - {""})
    return [
        PlannedRun(variant, seed, tuple(sorted(descriptors[variant])))
        for seed in range(max(seeds.values(), default=0))
        for variant in seeds
        if seed < seeds[variant]
    ]


def seeds_of(table: Table, most_seeds: int | None) -> Iterator[int]:
    yield from range(_seeds(table, most_seeds))


def _seeds(table: Table, most_seeds: int | None) -> int:
    return min(table.seeds, most_seeds or table.seeds)
