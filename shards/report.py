"""What pack.py shows on the terminal: tables and lines, nothing that is computed here.

BuildReport, VerifyReport, Overview -> [report] -> stdout
"""

from rich.console import Console
from rich.table import Table

from shards.pack import BuildReport


def print_build(report: BuildReport, out: str) -> None:
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
    console.print(f"{out}: {state}; fingerprint {dataset['fingerprint']}", markup=False)
