"""One dataset, or several as one (`market1501+msmt17`): identities and cameras stay apart per source.

    parsers ──▶ [Collection] ──▶ validate, shard plan, build

In a joint dataset each part's paths and identities begin with its name, and its cameras and views come after
those of the parts before it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from shards.dataset_file import MOST_NAME
from shards.datasets import ReIDDataset, get_dataset
from shards.datasets.manifest import TABLE_FORMATS
from shards.errors import DataError, shown
from shards.images.listing import describe_left_out
from shards.records import UNKNOWN_IDENTITIES, ImageRecord
from shards.storage import Source, local_path

LAYOUTS_OF_ANY = ("folders", "manifest", "mot")
"""Layouts whose names say nothing of the data."""


@dataclass
class Collection:
    """What was read: every image and what holds for all of them."""

    name: str
    noun: str
    cameras: int
    views: int
    records: list[ImageRecord]
    sources: dict[str, Source]
    """By the first part of a record's path; the one key of a dataset that is not joint is ""."""
    warnings: list[str] = field(default_factory=list)
    """What may be wrong with the files."""
    notes: list[str] = field(default_factory=list)
    """What is merely different from the published dataset."""


def read_collection(
    names: str,
    roots: Sequence[str],
    options: dict[str, Any] | None = None,
    noun: str | None = None,
    name: str | None = None,
) -> Collection:
    """Parse `NAME[+NAME...]`, one root each (a lone manifest takes its table and, if given, the image folder).

    options: fields of the datasets' dataclasses; each goes to every part that has it.
    name: what the dataset is called from now on; by default as its layout where that is a dataset's own, and as the
    root's folder where the layout is for any data. Raises DataError.
    """
    parts = names.split("+")
    classes = [get_dataset(name) for name in parts]
    options = dict(options or {})
    for option in options:
        if not any(option in _option_names(cls) for cls in classes):
            raise DataError(f"--{option.replace('_', '-')} does not apply to --dataset {names}")
    if not (len(roots) == len(parts) or (parts == ["manifest"] and len(roots) == 2)):
        raise DataError(f"--dataset {names} needs {len(parts)} --root, one each in the same order; got {len(roots)}")
    if len(parts) == 1:
        collection = _read_part(parts[0], roots, options)
    else:
        each = [_read_part(name, [root], options) for name, root in zip(parts, roots, strict=True)]
        collection = _join(names, _distinct(parts), each)
    if noun:
        collection.noun = noun
    if name or (parts[0] in LAYOUTS_OF_ANY and len(parts) == 1):
        collection.name = name or _folder_name(roots[0])
    if not collection.name.strip() or not collection.name.isprintable() or len(collection.name) > MOST_NAME:
        raise DataError(f"--name: {shown(collection.name)} is no name for a dataset: give letters that can be printed")
    return collection


def _folder_name(root: str) -> str:
    """Of the folder that is the root, or that the table or zip file lies in or is."""
    place = root.rstrip("/")
    if place.lower().endswith(TABLE_FORMATS):
        place = place.rpartition("/")[0]
    local = local_path(place or ".")
    name = Path(os.path.normpath(local.absolute())).name if local else PurePosixPath(place).name
    return name.removesuffix(".zip")


def _option_names(cls: type[ReIDDataset]) -> set[str]:
    return {option.name for option in fields(cls)}


def _read_part(name: str, roots: Sequence[str], options: dict[str, Any]) -> Collection:
    cls = get_dataset(name)
    own = {key: value for key, value in options.items() if key in _option_names(cls)}
    root = roots[0]
    if name == "manifest":
        if not root.lower().endswith(TABLE_FORMATS):
            raise DataError(f"--root {root}: dataset manifest wants a table, FILE.csv or FILE.parquet")
        own["table"] = root
        root = roots[1] if len(roots) > 1 else (root.rpartition("/")[0] or ".")
    dataset, source = cls(**own), Source(root)
    collection = Collection(name, dataset.noun, 0, 0, [], {"": source})
    collection.records = list(dataset.records(source, collection.warnings.append))
    if not collection.records:
        raise DataError(f"{name} at {roots[0]}: holds no images of {', '.join(dataset.splits)}")
    if unknown := [record.path for record in collection.records if record.identity.strip() in UNKNOWN_IDENTITIES]:
        raise DataError(
            f"{name} at {roots[0]}: {len(unknown):,} images have no identity, {unknown[0]} for one: leave them out, or "
            "give them one"
        )
    present = {record.split for record in collection.records}
    for split in dataset.splits:
        if split not in present:
            use = "trained" if split == "train" else "evaluated"
            collection.warnings.append(f"split {split} is empty: the dataset can't be {use} with")
    collection.cameras = _count(dataset.num_cameras, (record.camera for record in collection.records))
    collection.views = _count(dataset.num_views, (record.view for record in collection.records))
    if note := _compare_counts(name, dataset.known_counts, collection.records):
        collection.notes.append(note)
    collection.notes += [f"{name}: {line}" for line in source.notes]
    if line := describe_left_out(source.left_out):
        collection.notes.append(f"{name}: {line}")
    return collection


def _count(declared: int | None, numbers: Iterator[int]) -> int:
    return max(numbers, default=-1) + 1 if declared is None else declared


def _compare_counts(name: str, known: dict[str, tuple[int, int]], records: list[ImageRecord]) -> str:
    differences = []
    for part, (images, identities) in known.items():
        test_list = part.removeprefix("test list ")
        found = [r.identity for r in records if r.split == part or (r.lists and test_list in r.lists.split(","))]
        if (len(found), len(set(found))) != (images, identities):
            differences.append(f"{part} {len(found):,}/{len(set(found)):,} (published {images:,}/{identities:,})")
    return f"{name}: images/identities differ from the published: {', '.join(differences)}" if differences else ""


def _distinct(names: list[str]) -> list[str]:
    """Names that tell the parts apart: a second `manifest` becomes `manifest-2`."""
    return [
        name if names.index(name) == place else f"{name}-{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    ]


def _join(names: str, prefixes: list[str], parts: list[Collection]) -> Collection:
    nouns = {part.noun for part in parts}
    joint = Collection(names, nouns.pop() if len(nouns) == 1 else "object", 0, 0, [], {})
    for prefix, part in zip(prefixes, parts, strict=True):
        for record in part.records:
            joint.records.append(
                replace(
                    record,
                    path=f"{prefix}/{record.path}",
                    crop=replace(record.crop, file=f"{prefix}/{record.crop.file}") if record.crop else None,
                    identity=f"{prefix}/{record.identity}",
                    camera=record.camera + joint.cameras if record.camera >= 0 else -1,
                    view=record.view + joint.views if record.view >= 0 else -1,
                )
            )
        joint.sources[prefix] = part.sources[""]
        joint.cameras += part.cameras
        joint.views += part.views
        joint.warnings += [f"{prefix}: {line}" for line in part.warnings]
        joint.notes += part.notes
    return joint


def locate(sources: dict[str, Source], path: str) -> tuple[Source, str]:
    """The source of a record's path, and the path below that source's root."""
    if "" in sources:
        return sources[""], path
    prefix, _, below = path.partition("/")
    return sources[prefix], below
