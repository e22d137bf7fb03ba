"""Are the shards what was packed? The whole of `launch/pack.py verify`.

    dataset.json, index.parquet, *.tar ──▶ [verify, one shard a task] ──▶ list of problems

Every byte of every shard is read once, from front to back, along the index: so a damaged record is named and
the ones behind it are still checked.
"""

import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow
import pyarrow.compute

from shards import storage
from shards.dataset_file import read_dataset_json, unknown_keys
from shards.errors import AccessError, DamagedError
from shards.format import (
    DATASET_FILE,
    EXTENSIONS,
    INDEX_FILE,
    JSON_COLUMNS,
    fingerprint,
    first_member,
    is_key_of,
    tar_header,
    tar_padding,
)
from shards.images.pictures import BadPicture, read_picture
from shards.index_table import read_index_table
from shards.packing.processes import Advance, choose_processes, run_tasks
from shards.packing.writer import REPORT_EVERY
from shards.progress import Progress, silent
from shards.storage import join

log = logging.getLogger(__name__)
DECODE_EVERY = 50
"""Without --all, one of so many images is decoded (and the first of each shard)."""
COPY_BYTES = 1 << 20
AddProblem = Callable[[str, str], None]
"""Called with the key of an image (empty for the whole shard) and what is wrong."""


@dataclass(frozen=True)
class Problem:
    """One finding. `key` is empty when it concerns a whole file."""

    file: str
    key: str
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.key, self.what) if part)


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at and what was wrong with it."""

    problems: list[Problem]
    shards: int
    images: int
    decoded: int


@dataclass(frozen=True)
class ShardTask:
    """One shard to check in another process."""

    url: str
    name: str
    index: pyarrow.Table
    """Its part of the index."""
    expected: dict[str, int] | None
    """{"bytes", "crc32"} of the whole file, where dataset.json lists them."""
    decode_every: int


def verify(
    url: str,
    *,
    decode_all: bool = False,
    processes: int | None = None,
    progress: Progress = silent,
) -> VerifyReport:
    """Check counts, checksums, JSON and tar structure of a packed dataset, and decode a sample of its images.

    Raises DataError when there is no dataset.
    """
    file = DATASET_FILE
    try:
        dataset = read_dataset_json(url)
        file = INDEX_FILE
        table = read_index_table(url, dataset)
    except DamagedError as error:
        return VerifyReport([Problem(file, "", str(error))], 0, 0, 0)
    files = dataset.get("files", {})
    problems = [Problem(DATASET_FILE, "", f"unknown key {key}") for key in unknown_keys(dataset)]
    problems += _check_counts(dataset, table)
    tasks = _tasks(url, table, files, 1 if decode_all else DECODE_EVERY)
    known = {task.name for task in tasks}
    problems += [
        Problem(name, "", "is no part of the dataset: the index lists none of its images")
        for name in _list_folder(url)
        if name.endswith(".tar") and name not in known
    ]
    count = choose_processes(processes, table.num_rows, [url])
    decoded = 0
    for found, images in run_tasks(check_shard, tasks, count, progress, table.num_rows):
        problems += found
        decoded += images
    order = {task.name: place for place, task in enumerate(tasks, 1)}
    problems.sort(key=lambda problem: order.get(problem.file, 0))  # keeps the order within a shard
    return VerifyReport(problems, len(tasks), table.num_rows, decoded)


def _list_folder(url: str) -> list[str]:
    try:
        return storage.list_folder(url)
    except AccessError as error:  # many servers give files, but no listings
        log.warning("not looked for shards that are no part of the dataset: %s", error)
        return []


def _check_counts(dataset: dict[str, Any], table: pyarrow.Table) -> Iterator[Problem]:
    """The index against what dataset.json says of it."""
    facts = [(name, dataset[name]) for name in ("noun", "cameras", "views")]
    if fingerprint(facts, table) != dataset["fingerprint"]:
        yield Problem(INDEX_FILE, "", "its content does not give the fingerprint in dataset.json")
    found = {}
    for split in table.column("split").unique().to_pylist():
        mine = table.filter(pyarrow.compute.field("split") == split)
        found[split] = {
            "images": mine.num_rows,
            "identities": len(mine.column("identity").unique()),
            "shards": len(mine.column("shard").unique()),
        }
    for split in found | dataset["splits"]:
        counted, recorded = found.get(split), dataset["splits"].get(split)
        if counted != recorded:
            yield Problem(INDEX_FILE, "", f"split {split} holds {counted}, dataset.json says {recorded}")


def _tasks(url: str, table: pyarrow.Table, files: dict[str, dict[str, int]], decode_every: int) -> list[ShardTask]:
    return [
        ShardTask(url, name, table.filter(pyarrow.compute.field("shard") == name), files.get(name), decode_every)
        for name in table.column("shard").unique().to_pylist()
    ]


class _Stream:
    """A file read from front to back, its checksum taken on the way."""

    def __init__(self, file: IO[bytes]):
        self.file, self.position, self.crc32 = file, 0, 0

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; fewer only at the end of the file."""
        data = self.file.read(num_bytes)
        self.position += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        return data


def check_shard(task: ShardTask, advance: Advance) -> tuple[list[Problem], int]:
    """(problems of one shard in the order of its images, images decoded)."""
    problems: list[Problem] = []

    def add_problem(key: str, what: str) -> None:
        problems.append(Problem(task.name, key, what))

    rows = task.index.sort_by("offset").to_pylist()
    try:
        with storage.open_read(join(task.url, task.name)) as file:
            stream = _Stream(file)
            decoded = _check_images(rows, task.decode_every, stream, add_problem, advance)
            while stream.read(COPY_BYTES):
                pass
    except FileNotFoundError:
        add_problem("", f"missing; the index lists {len(rows):,} images in it: fetch it again, or pack again")
        return problems, 0
    except OSError as error:
        add_problem("", f"cannot be read ({error})")
        return problems, 0
    if task.expected and not problems:  # a bad record explains a wrong checksum
        _check_whole(task.expected, stream, add_problem)
    return problems, decoded


def _check_whole(expected: dict[str, int], stream: _Stream, add_problem: AddProblem) -> None:
    if stream.position != expected["bytes"]:
        add_problem("", f"{stream.position:,} bytes, packed were {expected['bytes']:,}: fetch it again, or pack again")
    elif "crc32" not in expected:
        add_problem("", "dataset.json does not list its crc32: pack again")
    elif stream.crc32 != expected["crc32"]:
        add_problem("", "bytes between the records differ from those packed: fetch it again, or pack again")


def _check_images(
    rows: list[dict[str, Any]],
    decode_every: int,
    stream: _Stream,
    add_problem: AddProblem,
    advance: Advance,
) -> int:
    """Walk the records; returns the number of images decoded."""
    decoded = 0
    before: dict[str, Any] | None = None
    for place, row in enumerate(rows):
        if row["offset"] < stream.position:
            add_problem(row["key"], f"the index gives offset {row['offset']}, inside the record before it")
            continue
        gap = stream.read(row["offset"] - stream.position)
        data = stream.read(row["size"])
        if len(data) < row["size"]:
            for cut in rows[place:]:
                add_problem(cut["key"], "the shard ends before the end of this image")
            return decoded
        _check_gap(gap, before, row, add_problem)
        if zlib.crc32(data) != row["crc32"]:
            add_problem(row["key"], "the image's bytes do not give the checksum in the index")
        elif place % decode_every == 0:
            decoded += 1
            if fault := _decode_fault(data, row):
                add_problem(row["key"], fault)
        before = row
        if place % REPORT_EVERY == REPORT_EVERY - 1:
            advance(REPORT_EVERY)
    advance(len(rows) % REPORT_EVERY)
    _check_gap(stream.read(COPY_BYTES), before, None, add_problem)
    return decoded


def _check_gap(
    gap: bytes,
    before: dict[str, Any] | None,
    following: dict[str, Any] | None,
    add_problem: AddProblem,
) -> None:
    """What lies between two images: the JSON of the one before, then the header of the following one."""
    if before:
        info, content = first_member(gap[len(tar_padding(before["size"])) :])
        if info is None or info.name != f"{before['key']}.json":
            add_problem(before["key"], "its JSON is missing from the tar, or has a damaged header")
        elif fault := _json_fault(content, before):
            add_problem(before["key"], f"its JSON {fault}")
    if following and not _ends_with_header(gap, following):
        add_problem(following["key"], "the tar header before the image is damaged or does not fit the index")


def _ends_with_header(gap: bytes, row: dict[str, Any]) -> bool:
    for extension in sorted(set(EXTENSIONS.values())):
        name = f"{row['key']}.{extension}"
        info, _ = first_member(gap[-len(tar_header(name, row["size"])) :])
        if info and info.name == name and info.size == row["size"]:
            return True
    return False


def _json_fault(content: bytes, row: dict[str, Any]) -> str:
    """What is wrong with KEY.json; empty when it says what the index says."""
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError):
        return "is not readable"
    if not isinstance(facts, dict) or not is_key_of(row["key"], str(facts.get("path"))):
        return "names another source path"
    different = [name for name in JSON_COLUMNS if facts.get(name) != row[name]]
    if facts.get("lists", "") != row["lists"]:
        different.append("lists")
    return f"differs from the index in {', '.join(different)}" if different else ""


def _decode_fault(data: bytes, row: dict[str, Any]) -> str:
    try:
        width, height = read_picture(data).stored_size
    except BadPicture as error:
        return f"the image cannot be decoded ({error})"
    if (width, height) != (row["width"], row["height"]):
        return f"the image is {width}x{height}, the index says {row['width']}x{row['height']}"
    return ""
