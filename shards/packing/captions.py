"""Captions from a table of their own, for images of any dataset: into their records, and so into their JSON.

    parsers ──▶ Collection ──▶ [captions] ──▶ shard plan ──▶ KEY.json: {"caption": "A photo of a ...", ...}

    path,caption
    image_train/0001_c001_00000012_0.jpg,"A photo of a red van, seen from the rear."

Paths are those of the images below their root; in a joint dataset the part's name comes before them.
"""

from dataclasses import replace

from shards.datasets.joint import Collection
from shards.datasets.manifest import csv_rows
from shards.errors import DataError, examples

COLUMNS = ["path", "caption"]
MOST_CAPTION_BYTES = 16_384


def add_captions(collection: Collection, table: str) -> None:
    """Give each image its caption. Raises DataError where the table is not one, and where images are not in it."""
    captions = read_captions(table)
    if missing := [record.path for record in collection.records if not captions.get(record.path)]:
        raise DataError(f"--captions {table}: {len(missing):,} images have no caption there: {examples(missing)}")
    collection.records = [replace(record, caption=captions[record.path]) for record in collection.records]
    if others := captions.keys() - {record.path for record in collection.records}:
        collection.warnings.append(
            f"--captions {table}: {len(others):,} paths are no images of the dataset: {examples(sorted(others))}"
        )


def read_captions(table: str) -> dict[str, str]:
    """Path -> caption of a CSV file. Raises DataError."""
    columns, rows = csv_rows(table)
    if columns != COLUMNS:
        raise DataError(f"--captions {table}: its columns are {', '.join(columns)[:80]}; they must be path,caption")
    captions: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        if len(row) != len(COLUMNS):
            raise DataError(f"--captions {table}, row {number}: {len(row)} cells for 2 columns")
        path, caption = row
        if len(caption.encode(errors="replace")) > MOST_CAPTION_BYTES:
            raise DataError(f"--captions {table}, row {number}: longer than {MOST_CAPTION_BYTES:,} bytes")
        if captions.setdefault(path, caption) != caption:
            raise DataError(f"--captions {table}, row {number}: {path[:80]} has a caption already, another one")
    return captions
