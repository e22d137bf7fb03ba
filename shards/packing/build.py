"""Raw dataset to shards: the whole of `launch/pack.py build`.

    read_collection ──▶ check_collection ──▶ plan_shards ──▶ write_shard (processes) ──▶ [index, dataset.json]

Each file gets its name when it is complete, and dataset.json comes last: until then there is no dataset.
Working files lie in OUT/.partial; a killed build is repeated with the same command and goes on.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from shards import storage
from shards.dataset_file import read_dataset_json, write_dataset_json
from shards.datasets.joint import Collection, read_collection
from shards.errors import DataError, examples
from shards.format import (
    DATASET_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    fingerprint,
    index_schema,
)
from shards.owner import owned_folder
from shards.packing.captions import add_captions
from shards.packing.findings import count_changes, same_pictures
from shards.packing.page import write_page
from shards.packing.processes import choose_processes, run_tasks
from shards.packing.shard_plan import PlannedShard, count_hashed_keys, plan_shards
from shards.packing.validate import check_collection
from shards.packing.writer import ShardRows, WriteJob, rows_url, write_shard
from shards.progress import Progress, silent
from shards.records import SPLITS
from shards.sealed import SealError, unseal
from shards.storage import join

WORK_FOLDER = ".partial"
SHARD_ROWS = re.compile(rf"({'|'.join(SPLITS)})-\d+\.json")
CHUNK_BYTES = 8 << 20
DEFAULT_QUALITY = 95


@dataclass(frozen=True)
class BuildReport:
    """What a build found and did."""

    dataset: dict[str, Any]
    """dataset.json."""
    warnings: list[str]
    notes: list[str]
    images_written: int
    """0 when everything was there already."""
    shards_kept: int
    """Finished shards of an earlier, interrupted call."""


def build(
    dataset: str,
    roots: Sequence[str],
    out: str,
    *,
    options: dict[str, Any] | None = None,
    noun: str | None = None,
    name: str | None = None,
    processes: int | None = None,
    shard_mb: int = 256,
    resize: tuple[int, int] | None = None,
    quality: int | None = None,
    captions: str | None = None,
    strict: bool = False,
    progress: Progress = silent,
) -> BuildReport:
    """Pack `dataset` (NAME[+NAME...]) from `roots` into the folder URL `out`.

    Args:
        options: fields of the parsers (views, drop_unlabelled, ...).
        noun: what the images show, instead of the dataset's own word.
        name: of the dataset, in all logs; default as in `read_collection`.
        processes: default the cores at hand.
        resize: (height, width) in pixels.
        captions: a table with a caption for each image (`captions.py`).

    Raises DataError on faulty input, on warnings when `strict`, and when `out` holds another dataset.
    """
    if quality is not None and not resize:
        raise DataError("--quality only applies to resized images: give --resize HxW, or leave it out")
    quality = quality or DEFAULT_QUALITY
    collection = read_collection(dataset, roots, options, noun, name)
    if captions:
        add_captions(collection, captions)
        options = {**(options or {}), "captions": (captions,)}
    warnings = check_collection(collection)
    _refuse(strict, warnings)
    recorded = _recorded_options(options, shard_mb, resize, quality)
    shards = plan_shards(collection, shard_mb << 20, {"resize": resize, "quality": quality if resize else None})
    with owned_folder(out, "packing"):
        if existing := _existing(out, collection, shards, recorded):
            found = existing.get("found", {})
            _refuse(strict, found.get("warnings", []))
            _remove_work(out)
            warnings, notes = warnings + found.get("warnings", []), collection.notes + found.get("notes", [])
            if existing["name"] != collection.name:
                notes.append(f"it is called {existing['name']} there, and stays so; to rename it pack it anew")
            return BuildReport(existing, warnings, notes, 0, len(shards))
        work = join(out, WORK_FOLDER)
        storage.make_folder(work)
        finished = _finished(out, work, shards)
        jobs = [
            WriteJob(shard, collection.sources, out, work, resize, quality)
            for shard in shards
            if shard.name not in finished
        ]
        urls = [out, *(source.root for source in collection.sources.values())]
        images = _write(jobs, choose_processes(processes, len(collection.records), urls), progress)
        rows = {shard.name: _read_rows(work, shard.name) for shard in shards}
        found = {
            "warnings": same_pictures(shards, rows),
            "notes": count_hashed_keys(shards) + count_changes(shards, rows),
        }
        _refuse(strict, found["warnings"])
        written = _publish(out, work, collection, shards, rows, recorded, found)
        warnings, notes = warnings + found["warnings"], collection.notes + found["notes"]
        return BuildReport(written, warnings, notes, images, len(finished))


def _refuse(strict: bool, warnings: list[str]) -> None:
    if strict and warnings:
        raise DataError(f"--strict, and there are {len(warnings)} warnings: {'; '.join(warnings)}")


def _recorded_options(
    options: dict[str, Any] | None, shard_mb: int, resize: tuple[int, int] | None, quality: int
) -> dict[str, Any]:
    """The options as dataset.json lists them: no folders of this machine."""
    recorded: dict[str, Any] = {"shard_mb": shard_mb, "resize": list(resize) if resize else None}
    if resize:
        recorded["quality"] = quality
    for name, value in sorted((options or {}).items()):
        recorded[name] = [PurePosixPath(file).name for file in value] if isinstance(value, tuple) else value
    return recorded


def _source_digest(name: str, collection: Collection, shards: Sequence[PlannedShard]) -> str:
    facts = [name, collection.noun, collection.cameras, collection.views]
    content = json.dumps([facts, [(shard.name, shard.signature) for shard in shards]])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _existing(
    out: str, collection: Collection, shards: Sequence[PlannedShard], recorded: dict[str, Any]
) -> dict[str, Any] | None:
    """dataset.json of a finished build of the same; raises DataError when `out` holds anything else."""
    names = storage.list_folder(out)
    if DATASET_FILE not in names:
        others = [name for name in names if not name.startswith(".")]
        if WORK_FOLDER not in names and others:
            raise DataError(f"--out {out}: holds other files ({examples(others)}): give a new or empty folder")
        return None
    dataset = read_dataset_json(out)
    remedy = "give another --out, or delete that folder first"
    now = {"noun": collection.noun} | recorded
    before = {"noun": dataset["noun"]} | dataset.get("options", {})
    if now != before:
        changed = sorted(key for key in now | before if now.get(key) != before.get(key))
        differences = ", ".join(f"{key} {before.get(key)} there, {now.get(key)} asked" for key in changed)
        raise DataError(f"--out {out}: packed with other options ({differences}): {remedy}")
    if dataset.get("source") != _source_digest(dataset["name"], collection, shards):
        raise DataError(f"--out {out}: the source has changed since this was packed: {remedy}")
    if missing := [name for name in dataset.get("files", {}) if name not in names]:
        raise DataError(f"--out {out}: incomplete, {examples(missing)} missing: delete that folder, then repeat")
    if storage.is_local(out):
        files = dataset.get("files", {}).items()
        torn = [name for name, facts in files if storage.size_bytes(join(out, name)) != facts["bytes"]]
        if torn:
            raise DataError(f"--out {out}: {examples(torn)} cut short: delete that folder, then repeat")
    return dataset


def _read_rows(work: str, shard: str) -> ShardRows:
    """Raises OSError, and SealError where they are not what was written."""
    facts = unseal(storage.read_bytes(rows_url(work, shard)))
    try:
        return ShardRows(**facts)
    except TypeError as error:
        raise SealError(str(error)) from None


def _finished(out: str, work: str, shards: Sequence[PlannedShard]) -> set[str]:
    """Names of the planned shards that an earlier call completed; what it left of other plans, or torn, is deleted."""
    signatures = {shard.name: shard.signature for shard in shards}
    finished = set()
    present = storage.list_folder(out)
    for file in _own_files(work):
        shard = file.replace(".json", ".tar")
        if shard in present and _is_whole(out, work, shard, signatures.get(shard)):
            finished.add(shard)
            continue
        if shard in present:
            storage.remove(join(out, shard))
        storage.remove(join(work, file))
    return finished


def _own_files(work: str) -> list[str]:
    """Of the work folder: rows, and working files of killed processes."""
    return [name for name in storage.list_folder(work) if name.startswith(".") or SHARD_ROWS.fullmatch(name)]


def _remove_work(out: str) -> None:
    """What the build put there, and the folder where nothing else is in it."""
    work = join(out, WORK_FOLDER)
    for name in _own_files(work):
        storage.remove(join(work, name))
    if not storage.list_folder(work):
        storage.remove(work)


def _is_whole(out: str, work: str, shard: str, signature: str | None) -> bool:
    """Whether a shard and its rows are there as they are planned. A remote one is not fetched for it: object stores
    show a file only when they have all of it, and check what they keep."""
    try:
        rows = _read_rows(work, shard)
    except SealError:
        return False
    if rows.signature != signature or len(rows.pixels) != len(rows.offsets):  # the latter: of an earlier version
        return False
    url = join(out, shard)
    if storage.size_bytes(url) != rows.num_bytes:
        return False
    return not storage.is_local(url) or _crc32(url) == rows.crc32


def _crc32(url: str) -> int:
    checksum = 0
    with storage.open_read(url) as file:
        while data := file.read(CHUNK_BYTES):
            checksum = zlib.crc32(data, checksum)
    return checksum


def _write(jobs: Sequence[WriteJob], processes: int, progress: Progress) -> int:
    """Write the shards; returns the images written. Raises DataError naming the unreadable ones."""
    total = sum(len(job.shard.records) for job in jobs)
    bad: list[str] = []
    for lines in run_tasks(write_shard, jobs, processes, progress, total):
        bad += lines
    if bad:
        raise DataError(
            f"{len(bad):,} images cannot be read: {examples(sorted(bad))}; replace them, or remove them from the "
            "dataset and its lists, then repeat the command"
        )
    return total


def _publish(
    out: str,
    work: str,
    collection: Collection,
    shards: Sequence[PlannedShard],
    rows: dict[str, ShardRows],
    recorded: dict[str, Any],
    found: dict[str, list[str]],
) -> dict[str, Any]:
    """Write index.parquet and then dataset.json, from the rows of all shards; returns the latter.

    found: what the pictures told. A repeated call, which decodes none, tells it from dataset.json.
    """
    table = _index_table(shards, rows)
    files = {name: {"bytes": row.num_bytes, "crc32": row.crc32} for name, row in rows.items()}
    files[INDEX_FILE] = _write_index(out, work, table)
    facts = {"noun": collection.noun, "cameras": collection.cameras, "views": collection.views}
    dataset = {
        "format_version": FORMAT_VERSION,
        "name": collection.name,
        **facts,
        "splits": _split_counts(shards),
        "fingerprint": fingerprint(facts.items(), table),
        "options": recorded,
        "source": _source_digest(collection.name, collection, shards),
        "files": files,
    }
    if any(found.values()):
        dataset["found"] = found
    write_page(out, dataset, work)
    write_dataset_json(out, dataset, work)
    _remove_work(out)
    return dataset


def _index_table(shards: Sequence[PlannedShard], rows: dict[str, ShardRows]) -> Any:
    import pyarrow as pa

    schema = index_schema()
    batches = []
    for shard in shards:
        row, records = rows[shard.name], shard.records
        columns = {
            "split": [shard.split] * len(records),
            "shard": [shard.name] * len(records),
            "key": shard.keys,
            "offset": row.offsets,
            "size": row.sizes,
            "crc32": row.crcs,
            "identity": [r.identity for r in records],
            "label": shard.labels,
            "camera": [r.camera for r in records],
            "view": [r.view for r in records],
            "time": [r.time for r in records],
            "lists": [r.lists for r in records],
            "width": row.widths,
            "height": row.heights,
        }
        batches.append(pa.RecordBatch.from_pydict(columns, schema))
    return pa.Table.from_batches(batches, schema).combine_chunks()


def _write_index(out: str, work: str, table: Any) -> dict[str, int]:
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, compression="none")
    data = sink.getvalue()
    with storage.write_atomic(join(out, INDEX_FILE), work) as file:
        file.write(data)
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def _split_counts(shards: Sequence[PlannedShard]) -> dict[str, dict[str, int]]:
    counts = {}
    for split in SPLITS:
        if mine := [shard for shard in shards if shard.split == split]:
            counts[split] = {
                "images": sum(len(shard.records) for shard in mine),
                "identities": len({r.identity for shard in mine for r in shard.records}),
                "shards": len(mine),
            }
    return counts
