"""dataset.json: what holds for a whole packed dataset, written last and with a checksum of itself.

    build ──▶ [dataset.json] ──▶ index, verify, overview

Without it there is no dataset.
"""

import json
import zlib
from typing import Any

from shards import storage
from shards.errors import DamagedError, DataError
from shards.format import DATASET_FILE, FORMAT_VERSION, MOST_IMAGES, MOST_NUMBER, PLAIN_NAME
from shards.records import SPLITS

REQUIRED = {
    "format_version": int,
    "name": str,
    "noun": str,
    "cameras": int,
    "views": int,
    "splits": dict,
    "fingerprint": str,
}
MOST_BYTES = 1 << 28
MOST_NAME = 1000
"""Characters; a joint dataset has the names of its parts."""
COUNTED = {
    "splits": {"images": ("how many images", MOST_IMAGES)},
    "files": {"bytes": ("how many bytes", 1 << 50), "crc32": ("its crc32", 2**32 - 1)},
}
"""Numbers of each entry: what they say, and the largest that can be."""
OPTIONAL = {"options": dict, "source": str, "files": dict, "found": dict, "crc32": int}
"""`crc32`: of all the other keys, see `_checksum`; datasets packed before it was written have none."""


def write_dataset_json(url: str, dataset: dict[str, Any], work: str) -> None:
    """Write it into the folder `url`. work: folder of the working file."""
    storage.write_json(storage.join(url, DATASET_FILE), dataset | {"crc32": _checksum(dataset)}, work)


def read_dataset_json(url: str) -> dict[str, Any]:
    """The dataset's facts, its keys and types checked.

    Raises DataError where there is none, or one of another format; DamagedError where it is not as it was written.
    """
    where = storage.join(url, DATASET_FILE)
    try:
        data = storage.read_bytes(where)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{where}: no such file, so this is no packed dataset, or its packing never finished; "
            "give the --out of `launch/pack.py build`, or run that command again"
        ) from error
    try:
        if len(data) > MOST_BYTES:
            raise ValueError(f"{len(data):,} bytes, more than {MOST_BYTES:,}")
        dataset = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not JSON ({error}); copy it again or re-pack") from error
    if fault := _fault(dataset):
        raise DamagedError(f"{where}: {fault}; copy it again or re-pack")
    if dataset["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{where}: format_version is {dataset['format_version']!r}, this program reads {FORMAT_VERSION}; "
            "pack the dataset again with this version"
        )
    dataset.pop("crc32", None)
    return dataset


def unknown_keys(dataset: dict[str, Any]) -> list[str]:
    """Keys that nothing reads: a damaged name is one of them."""
    return [key for key in dataset if key not in REQUIRED | OPTIONAL]


def _checksum(dataset: dict[str, Any]) -> int:
    """Of the values, however they are laid out in the file."""
    rest = {key: value for key, value in dataset.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _fault(dataset: Any) -> str:
    """What is wrong with the content; empty when it can be used, or is of another format."""
    if not isinstance(dataset, dict):
        return "holds no keys and values"
    if "crc32" in dataset and dataset["crc32"] != _checksum(dataset):
        return "its checksum says that it was changed since it was written"
    if dataset.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        return ""
    for key, kind in (REQUIRED | OPTIONAL).items():
        if key in REQUIRED and key not in dataset:
            return f"lacks {key}"
        if key in dataset and type(dataset[key]) is not kind:
            return f"{key} is {dataset[key]!r}, not of type {kind.__name__}"
    for key in ("cameras", "views"):
        if not 0 <= dataset[key] <= MOST_NUMBER + 1:
            return f"{key} is {dataset[key]}, not from 0 to {MOST_NUMBER + 1}"
    for key in ("name", "noun"):
        if not dataset[key].strip() or len(dataset[key]) > MOST_NAME or not dataset[key].isprintable():
            return f"{key} is {dataset[key][:80]!a}, which is no name"
    for name in dataset["splits"]:
        if name not in SPLITS:
            return f"splits has {name[:80]!a}, not one of {', '.join(SPLITS)}"
    for name in dataset.get("files", {}):
        if not PLAIN_NAME.fullmatch(name):
            return f"files has {name[:80]!a}, which is no name of a file"
    for key, units in COUNTED.items():
        for name, facts in dataset.get(key, {}).items():
            for unit, (what, most) in units.items():
                count = facts.get(unit) if isinstance(facts, dict) else None
                if unit == "crc32" and isinstance(facts, dict) and unit not in facts:
                    continue  # of others; verify says so
                if type(count) is not int or not 0 <= count <= most:
                    return f"{key}.{name} does not say {what}, a number from 0 to {most}"
    return ""
