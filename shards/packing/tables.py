"""What pack.py shows on the terminal: tables and lines, nothing that is computed here.

    BuildReport, VerifyReport, Overview ──▶ [tables] ──▶ stdout

The numbers come from build, verify and overview.
"""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from shards.errors import examples, masked
from shards.records import SPLITS

if TYPE_CHECKING:
    from shards.datasets.joint import Collection
    from shards.packing.build import BuildReport
    from shards.packing.overview import Overview, SplitOverview
    from shards.packing.verify import VerifyReport

BAR_WIDTH = 30
"""Characters of the longest bar of a histogram."""


def print_build(report: "BuildReport", out: str) -> None:
    """The finished dataset: its splits, what looks wrong in it, and where it lies."""
    console = Console(highlight=False, soft_wrap=True)
    dataset = report.dataset
    table = Table("split", title=f"{dataset['name']} ({dataset['noun']})", title_justify="left")
    for name in ("images", "identities", "shards"):
        table.add_column(name, justify="right")
    for split, counts in dataset["splits"].items():
        table.add_row(split, *(f"{counts[name]:,}" for name in ("images", "identities", "shards")))
    console.print(table)
    for line in report.warnings:
        console.print(f"warning: {line}", markup=False)
    for line in report.notes:
        console.print(f"note: {line}", markup=False)
    if not report.images_written and report.shards_kept:
        state = "already there, nothing to do"
    elif report.shards_kept:
        state = f"packed; {report.shards_kept} finished shards of an interrupted call kept"
    else:
        state = "packed"
    console.print(f"{masked(out)}: {state}; fingerprint {dataset['fingerprint']}", markup=False)


def print_plan(collection: "Collection", warnings: list[str]) -> None:
    """What a build would pack: its splits, some images of each, how they came there, and what looks wrong."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table("split", title=f"{collection.name} ({collection.noun})", title_justify="left")
    for name in ("images", "identities", "cameras"):
        table.add_column(name, justify="right")
    table.add_column("for example")
    for split in SPLITS:
        if records := [record for record in collection.records if record.split == split]:
            identities = {record.identity for record in records}
            cameras = {record.camera for record in records} - {-1}
            counts = (f"{len(found):,}" for found in (records, identities, cameras))
            table.add_row(split, *counts, examples([record.path for record in records[:2]]))
    console.print(table)
    for line in warnings:
        console.print(f"warning: {line}", markup=False)
    for line in collection.notes:
        console.print(f"note: {line}", markup=False)
    console.print("nothing was written: without --dry-run the images are decoded and packed")


def print_verify(report: "VerifyReport", url: str) -> None:
    """Every problem, one line each, then what was looked at."""
    console = Console(highlight=False, soft_wrap=True)
    for problem in report.problems:
        console.print(masked(f"bad: {problem}"), markup=False)
    verdict = f"{len(report.problems):,} problems" if report.problems else "all good"
    seen = f"{report.shards:,} shards, {report.images:,} images, {report.decoded:,} of them decoded"
    console.print(f"{masked(url)}: {verdict}; {seen}", markup=False)


def print_overview(overview: "Overview") -> None:
    """Tables of the splits, of images per identity, and of images per camera and view."""
    console = Console(highlight=False)
    dataset = overview.dataset
    console.print(f"{masked(overview.url)}: {dataset['name']}, noun {dataset['noun']!r}", markup=False)
    recorded = dataset.get("options", {}).items()
    options = ", ".join(f"{name} {value}" for name, value in recorded if value is not None)
    console.print(f"fingerprint {dataset['fingerprint']}; {options}", markup=False)
    console.print(_split_table(overview))
    console.print(_histogram_table(overview.splits))
    for number_of, name in ((dataset["cameras"], "camera"), (dataset["views"], "view")):
        if number_of:
            console.print(_number_table(overview.splits, name, number_of))


def _split_table(overview: "Overview") -> Table:
    table = Table("", title="splits", title_justify="left")
    for split in overview.splits:
        table.add_column(split.name, justify="right")
    lines = {
        "images": lambda s: f"{s.images:,}",
        "identities": lambda s: f"{s.identities:,}",
        "cameras": lambda s: f"{sum(camera >= 0 for camera in s.images_per_camera)}",
        "views": lambda s: f"{sum(view >= 0 for view in s.images_per_view)}",
        "width, pixels": lambda s: str(s.widths),
        "height, pixels": lambda s: str(s.heights),
        "kB an image": lambda s: str(s.image_kb),
        "shards": lambda s: f"{s.shards:,}",
        "MB of shards": lambda s: f"{s.num_bytes / 1e6:,.1f}",
    }
    for name, line in lines.items():
        table.add_row(name, *(line(split) for split in overview.splits))
    return table


def _histogram_table(splits: list["SplitOverview"]) -> Table:
    table = Table("split", title="images per identity", title_justify="left")
    table.add_column("images", justify="right")
    table.add_column("identities", justify="right")
    table.add_column("")
    for split in splits:
        classes = split.histogram()
        longest = max(count for _, count in classes)
        for place, (name, count) in enumerate(classes):
            bar = "█" * -(-count * BAR_WIDTH // longest)
            last = place == len(classes) - 1
            table.add_row(split.name if not place else "", name, f"{count:,}", bar, end_section=last)
    return table


def _number_table(splits: list["SplitOverview"], name: str, count: int) -> Table:
    table = Table(name, title=f"images per {name}", title_justify="left")
    for split in splits:
        table.add_column(split.name, justify="right")
    counts = [split.images_per_camera if name == "camera" else split.images_per_view for split in splits]
    for number in [*range(count), -1]:
        if any(number in count for count in counts):
            label = str(number) if number >= 0 else "unknown"
            table.add_row(label, *(f"{count.get(number, 0):,}" for count in counts))
    return table
