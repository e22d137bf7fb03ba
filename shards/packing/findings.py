"""What a dataset's pictures tell once all are decoded: what is changed in them, and which are the same.

    rows of all shards -> [findings] -> BuildReport, dataset.json

Pictures are the same when their pixels are, whatever file they are stored in; files that agree byte for byte are.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from shards.errors import examples
from shards.images.pictures import CHANGES
from shards.packing.shard_plan import PlannedShard
from shards.packing.writer import CUT_OUT, STORED_AS_PNG, ShardRows
from shards.records import ImageRecord


def count_changes(shards: Sequence[PlannedShard], rows: Mapping[str, ShardRows]) -> list[str]:
    """A line for everything that is done to images, with how many and some of them."""
    changed: dict[str, list[str]] = defaultdict(list)
    for shard in shards:
        for record, changes in zip(shard.records, rows[shard.name].changes, strict=True):
            for change in changes:
                changed[change].append(record.path)
    return [
        f"{len(changed[change]):,} images {change}: {examples(sorted(changed[change]))}"
        for change in (*CHANGES, CUT_OUT, STORED_AS_PNG)
        if change in changed
    ]


def same_pictures(shards: Sequence[PlannedShard], rows: Mapping[str, ShardRows]) -> list[str]:
    """A warning for each way in which a picture that is there twice makes figures meaningless."""
    queries = sum(record.split == "query" for shard in shards for record in shard.records)
    matched: list[str] = []
    twice: list[str] = []
    trained: list[str] = []
    two_names: list[str] = []
    for group in _groups(shards, rows):
        if pair := _differing(group, lambda record: record.identity):
            two_names.append(" = ".join(f"{record.path} (identity {record.identity})" for record in pair))
        if pair := _differing(group, lambda record: record.split == "train"):
            trained.append(" = ".join(record.path for record in pair))
        if len(pair := [record for record in group if record.split == "test"][:2]) == 2:
            twice.append(" = ".join(record.path for record in pair))
        matched += _matched_queries(group)
    lines = (
        (matched, f"of {queries:,} queries are in the gallery too, with no camera that keeps them apart"),
        (twice, "pictures are twice in test"),
        (trained, "pictures are in both train and test"),
        (two_names, "pictures are there under two identities"),
    )
    return [f"{len(found):,} {what}: {examples(sorted(found))}" for found, what in lines if found]


def _groups(shards: Sequence[PlannedShard], rows: Mapping[str, ShardRows]) -> Iterable[list[ImageRecord]]:
    """The records of each picture that is there more than once."""

    def pictures() -> Iterator[tuple[str, ImageRecord]]:
        for shard in shards:
            yield from zip(rows[shard.name].pixels, shard.records, strict=True)

    counts = Counter(pixels for pixels, _ in pictures())
    groups: dict[str, list[ImageRecord]] = defaultdict(list)
    for pixels, record in pictures():
        if counts[pixels] > 1:
            groups[pixels].append(record)
    return groups.values()


def _differing(group: list[ImageRecord], what: Callable[[ImageRecord], object]) -> list[ImageRecord]:
    """The first record and the first that differs from it in this; empty where none does."""
    return next(([group[0], record] for record in group if what(record) != what(group[0])), [])


def _matched_queries(group: list[ImageRecord]) -> Iterator[str]:
    """`QUERY = GALLERY IMAGE` of the queries for which evaluation does not leave the same gallery picture out.

    It leaves out what shows the query's identity under its camera, at its time; unknown cameras are no reason.
    """
    gallery = {(r.identity, r.camera, r.time): r for r in reversed(group) if r.split == "gallery"}
    for query in (record for record in group if record.split == "query"):
        own = (query.identity, query.camera, query.time)
        other = next((record for seen, record in gallery.items() if seen != own or query.camera < 0), None)
        if other is not None:
            yield f"{query.path} = {other.path}"
