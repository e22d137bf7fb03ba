"""Which image goes into which shard, decided before the first one is read.

    Collection ──▶ [shard plan] ──▶ writer (one shard a task)

The plan follows from names and file sizes alone, so any number of processes writes the same bytes and a later call
knows which shards are finished.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from operator import attrgetter
from typing import Any

from shards.datasets.joint import Collection, locate
from shards.errors import DataError, examples
from shards.format import FORMAT_VERSION, TAR_BLOCK, ascii_key, make_key, make_keys, shard_name
from shards.records import SPLITS, ImageRecord

# dataclasses.astuple copies, ten times slower. A crop says nothing of images that are whole files, a caption nothing of
# those without one.
_values = attrgetter(*(f.name for f in fields(ImageRecord) if f.name not in ("crop", "caption")))
CROP_PIXEL_BYTES = 2
"""That a pixel of a crop takes about, stored as PNG."""


@dataclass(frozen=True)
class PlannedShard:
    """Images of one shard, in its order."""

    name: str
    split: str
    records: list[ImageRecord]
    labels: list[int]
    """0..N-1 of the sorted training identities; -1 outside train."""
    keys: list[str]
    """Names of the images in the shard; unique in the split."""
    signature: str
    """Changes with anything that changes the shard's bytes, except a file rewritten with the same size."""


def plan_shards(collection: Collection, shard_bytes: int, options: dict[str, Any]) -> list[PlannedShard]:
    """Shards of about `shard_bytes`, each split ordered by identity and path.

    A training identity stays whole, so its shard may be larger; elsewhere a shard ends at the next image.
    Raises DataError when files are not there.
    """
    sizes = _file_sizes(collection)
    identities = sorted({r.identity for r in collection.records if r.split == "train"})
    labels = {identity: label for label, identity in enumerate(identities)}
    shards = []
    for split in SPLITS:
        records = sorted(
            (r for r in collection.records if r.split == split), key=lambda record: (record.identity, record.path)
        )
        key_of = dict(zip((r.path for r in records), make_keys([r.path for r in records]), strict=True))
        for number, part in enumerate(_cut(records, sizes, shard_bytes, whole_identities=split == "train")):
            part_labels = [labels[r.identity] if split == "train" else -1 for r in part]
            keys = [key_of[r.path] for r in part]
            signature = _signature(part, part_labels, keys, sizes, options)
            shards.append(PlannedShard(shard_name(split, number), split, part, part_labels, keys, signature))
    return shards


def count_hashed_keys(shards: Sequence[PlannedShard]) -> list[str]:
    """A line that says how many keys are not those that their paths alone would give."""
    hashed = [
        r.path for shard in shards for r, key in zip(shard.records, shard.keys, strict=True) if key != make_key(r.path)
    ]
    if not hashed:
        return []
    return [f"{len(hashed):,} keys carry a hash of the path, as others would be the same: {examples(sorted(hashed))}"]


def _file_sizes(collection: Collection) -> dict[str, int]:
    """Bytes by the records' files. One call a source, so that remote ones can ask for many at a time."""
    by_source: dict[int, list[tuple[str, str]]] = {}
    for path in dict.fromkeys(record.file for record in collection.records):
        source, below = locate(collection.sources, path)
        by_source.setdefault(id(source), []).append((path, below))
    sizes: dict[str, int] = {}
    for source in collection.sources.values():
        paths = by_source.get(id(source), [])
        found = source.sizes([below for _, below in paths])
        if missing := [below for (_, below), size in zip(paths, found, strict=True) if size is None]:
            raise DataError(f"{source.root}: {len(missing):,} images are not there: {examples(missing)}")
        sizes |= {path: size for (path, _), size in zip(paths, found, strict=True) if size is not None}
    return sizes


def _cut(
    records: list[ImageRecord], sizes: dict[str, int], limit: int, whole_identities: bool
) -> Iterator[list[ImageRecord]]:
    groups = groupby(records, key=lambda r: r.identity if whole_identities else r.path)
    shard: list[ImageRecord] = []
    filled = 0
    for _, images in groups:
        group = list(images)
        # header and data of the image, header and data of its JSON
        room = sum(3 * TAR_BLOCK + -(-_stored(r, sizes) // TAR_BLOCK) * TAR_BLOCK for r in group)
        if shard and filled + room > limit:
            yield shard
            shard, filled = [], 0
        shard += group
        filled += room
    if shard:
        yield shard


def _stored(record: ImageRecord, sizes: dict[str, int]) -> int:
    """About the bytes of an image in a shard: a crop is not known before it is cut."""
    if record.crop is None:
        return sizes[record.path]
    left, top, right, bottom = record.crop.box
    return CROP_PIXEL_BYTES * max(right - left, 1) * max(bottom - top, 1)


def _signature(
    records: list[ImageRecord], labels: list[int], keys: list[str], sizes: dict[str, int], options: dict[str, Any]
) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, options], sort_keys=True).encode())
    for record, label, key in zip(records, labels, keys, strict=True):
        digest.update(repr((_values(record), label, sizes[record.file])).encode())
        if record.crop:
            digest.update(repr(record.crop).encode())
        if key != ascii_key(record.path):  # else the path says it, as it did before there were other keys
            digest.update(key.encode())
        if record.caption:  # so that datasets without captions keep the signatures of earlier versions
            digest.update(record.caption.encode())
    return digest.hexdigest()
