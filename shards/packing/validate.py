"""What can be wrong with a dataset before any image is read.

    Collection ──▶ [validate] ──▶ shard plan ──▶ writer

Errors stop the packing; warnings are printed with the report, and stop it under --strict.
"""

from collections import Counter, defaultdict

from shards.datasets.joint import Collection
from shards.errors import DataError, examples
from shards.format import make_keys
from shards.records import SPLITS, ImageRecord


def check_collection(collection: Collection) -> list[str]:
    """Warnings, one line each, in a fixed order; raises DataError on images that would share a key."""
    by_split = {split: [r for r in collection.records if r.split == split] for split in SPLITS}
    for split, records in by_split.items():
        _check_keys(split, records)
    checks = (
        _single_images(by_split["train"]),
        _in_train_and_test(by_split),
        _unmatched_queries(by_split["query"], by_split["gallery"], bool(collection.cameras)),
    )
    return [*collection.warnings, *(warning for warning in checks if warning)]


def _check_keys(split: str, records: list[ImageRecord]) -> None:
    paths: dict[str, str] = {}
    for record, key in zip(records, make_keys([record.path for record in records]), strict=True):
        if key in paths:
            raise DataError(
                f"split {split}: {paths[key]} and {record.path} both get the key {key}: rename one, or list it once"
            )
        paths[key] = record.path


def _single_images(train: list[ImageRecord]) -> str:
    counts = Counter(record.identity for record in train)
    single = sorted(identity for identity, count in counts.items() if count == 1)
    if not single:
        return ""
    return f"{len(single):,} of {len(counts):,} training identities have one image only: {examples(single)}"


def _in_train_and_test(by_split: dict[str, list[ImageRecord]]) -> str:
    train = {record.identity for record in by_split["train"]}
    tested = {record.identity for split in SPLITS[1:] for record in by_split[split]}
    both = sorted(train & tested)
    return f"{len(both):,} identities are in both train and test: {examples(both)}" if both else ""


def _unmatched_queries(query: list[ImageRecord], gallery: list[ImageRecord], camera_rule: bool) -> str:
    """Queries that evaluation has to leave out: no gallery image of the identity from another camera."""
    cameras = defaultdict(set)
    for record in gallery:
        cameras[record.identity].add(record.camera)
    absent = [r.path for r in query if r.identity not in cameras]
    same_camera = [r.path for r in query if camera_rule and r.camera >= 0 and cameras.get(r.identity) == {r.camera}]
    if not absent and not same_camera:
        return ""
    return (
        f"{len(absent) + len(same_camera):,} of {len(query):,} queries have no valid gallery match "
        f"({len(absent):,}: identity not in the gallery; {len(same_camera):,}: there under the same camera only): "
        + examples(absent + same_camera)
    )
