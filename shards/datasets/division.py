"""Identities without a split -> train, query and gallery.

    records of a parser ──▶ [division] ──▶ the same records, each in a split

Who is tested with is told by a hash of the seed and the identity, and which image is a query by one of the seed and its
path: identities that are added later move none of the others.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from shards.errors import DataError
from shards.records import ImageRecord

LEAST_TEST = 2
"""Identities to test with: one alone is never mistaken for another."""


def divide(records: Iterable[ImageRecord], test_share: float, seed: int) -> Iterator[ImageRecord]:
    """In the order of the records. Raises DataError where there are too few identities to divide."""
    records = list(records)
    by_identity = defaultdict(list)
    for record in records:
        by_identity[record.identity].append(record)
    tested = _tested(by_identity, test_share, seed)
    queries = {record.path for identity in tested for record in _queries(by_identity[identity], seed)}
    for record in records:
        split = "train" if record.identity not in tested else "query" if record.path in queries else "gallery"
        yield replace(record, split=split)


def explain(test_share: float, seed: int) -> str:
    """What `divide` does, in three sentences."""
    return (
        f"a share of {test_share:g} of the identities, drawn with seed {seed}, is for testing, and all images of the "
        "others are for training. Of every test identity one image a camera is a query, and the rest is the gallery. "
        "At least one image of each stays in the gallery."
    )


def _tested(identities: Iterable[str], test_share: float, seed: int) -> set[str]:
    drawn = sorted(identities, key=lambda identity: _draw(seed, identity))
    count = round(len(drawn) * test_share)
    if drawn and test_share and count < LEAST_TEST:
        raise DataError(
            f"--test-share {test_share:g} of {len(drawn)} identities is {count}: at least {LEAST_TEST} are needed to "
            "test with; give a larger share, more identities, or 0 to train with all"
        )
    return set(drawn[:count])


def _queries(images: list[ImageRecord], seed: int) -> list[ImageRecord]:
    """One image a camera, of which the last stays in the gallery where nothing else would."""
    first: dict[int, ImageRecord] = {}
    for record in sorted(images, key=lambda record: _draw(seed, record.path)):
        first.setdefault(record.camera, record)
    return list(first.values())[: len(images) - 1]


def _draw(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).hexdigest()
