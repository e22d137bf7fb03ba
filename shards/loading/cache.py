"""The node's cache folder: whole remote shards, shared by all processes of the node.

    remote shards ──▶ [cache: fetch ahead, evict] ──▶ reader (maps the file)

A shard appears under its name only when it is complete, and its checksum is compared with `dataset.json`. Locks on
the files say what goes on: whoever reads a shard holds a shared one, and eviction, which takes the least recently
opened first, passes it by; whoever downloads holds an exclusive one on the working file, so no shard is fetched
twice, and a working file that nobody holds was left by a process that died.
"""

import contextlib
import errno
import fcntl
import logging
import os
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shards.errors import DataError
from shards.private import is_private, open_own, private_folder
from shards.source import ShardSource

log = logging.getLogger(__name__)
RANGE_BYTES = 8 << 20
DOWNLOADS = 2
"""A shard whose checksum is wrong this often is wrong at its source. It is kept: its records name what is damaged."""
RETRY_S = 0.2
"""Between two looks at shards that could not be fetched ahead."""
REMEDY = "remove it, or give another folder as data.cache_dir"


@dataclass(frozen=True)
class CacheSettings:
    """Where a node keeps remote shards, and how much of them."""

    folder: str | None = None
    """None: where the index has its own."""
    limit_bytes: int = 50_000_000_000


DEFAULT_CACHE = CacheSettings()


def node_cache_dir(cache_dir: str | None) -> Path:
    """The node's cache folder, which is this user's alone: `cache_dir` where nobody else may write to it, else a folder
    in it; without one, in the system's temporary folder. Raises DataError where it cannot be had.
    """
    place = Path(cache_dir).resolve() if cache_dir else Path(tempfile.gettempdir())
    try:
        if cache_dir:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_private(place):
                return place
        return private_folder(place / f"clipreid-cache-{os.getuid()}", REMEDY)
    except OSError as error:
        raise DataError(f"data.cache_dir: can't write {place} ({error}); give another folder") from error


class Busy(Exception):
    """Another process downloads the shard just now."""


class Full(Exception):
    """The shards that are in use leave no room just now."""


class ShardCache:
    """Shards of one remote dataset, as files of this node."""

    def __init__(self, source: ShardSource, files: dict[str, dict], dataset: str, folder: Path, limit_bytes: int):
        """
        Args:
            files: {shard: {"bytes": length, "crc32": checksum or None}}.
            dataset: a name that no other packing has.
            folder: the node's cache folder.
            limit_bytes: of all shards in that folder, whatever dataset they are of.
        """
        self.source, self.files, self.limit_bytes = source, files, limit_bytes
        self.root = folder / "shards"
        self.folder = self.root / dataset

    def open(self, name: str) -> BinaryIO | None:
        """A complete cached shard, kept in the cache until the file is closed; None when it is not there."""
        with contextlib.suppress(FileNotFoundError):
            file = open_own(self.folder / name)
            fcntl.flock(file, fcntl.LOCK_SH)
            stat = os.fstat(file.fileno())
            if stat.st_nlink and stat.st_size == self.files[name]["bytes"]:
                os.utime(file.fileno())
                return file
            file.close()
            if stat.st_nlink:  # else it was evicted since it was opened
                self.discard(name)
        return None

    def fetch(self, name: str, wait: bool = True, stop: threading.Event | None = None) -> BinaryIO | None:
        """Like `open`, but downloads what is not there. None when there is no room, or when `stop` was set.

        Raises DataError when the source keeps failing; without `wait`, Busy while another process downloads it, and
        Full while there is no room for it.
        """
        for folder in (self.root, self.folder):
            private_folder(folder, REMEDY)
        working = self.folder / f"{name}.part"
        while (file := self.open(name)) is None:
            part = open_own(working, os.O_RDWR | os.O_CREAT)
            if not _lock(part):
                with part:
                    if not wait:
                        raise Busy
                    fcntl.flock(part, fcntl.LOCK_SH)  # granted when who downloads it has finished, or died
                continue
            if not _has_name(part, working):  # it was finished or given up between the two lines above
                part.close()
                continue
            complete = False
            try:
                has_room = self._reserve(part, self.files[name]["bytes"])
                if not has_room and not wait:
                    raise Full
                complete = has_room and self._download(name, part, stop)
            finally:
                if not complete:
                    working.unlink()
                    part.close()
            if not complete:
                return None
            working.replace(self.folder / name)
            fcntl.flock(part, fcntl.LOCK_SH)
            part.seek(0)
            return part
        return file

    def fits(self, name: str) -> bool:
        """Whether an empty cache would have room for it."""
        return self.files[name]["bytes"] <= self.limit_bytes

    def discard(self, name: str) -> bool:
        """Drop a damaged copy; those who have it mapped keep it. False when there was none."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / name).unlink()
            log.warning("%s: the cached copy is damaged; it is fetched again", self.source.where(name))
            return True
        return False

    def _download(self, name: str, part: BinaryIO, stop: threading.Event | None) -> bool:
        length, expected = self.files[name]["bytes"], self.files[name]["crc32"]
        for _ in range(DOWNLOADS):
            part.seek(0)
            checksum = 0
            for start in range(0, length, RANGE_BYTES):
                if stop is not None and stop.is_set():
                    return False
                data = self.source.read_range(name, start, min(start + RANGE_BYTES, length))
                checksum = zlib.crc32(data, checksum)
                try:
                    part.write(data)
                    part.flush()
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    log.warning("%s: the disk is full; %s is read from its source", self.root, name)
                    return False
            if expected in (None, checksum):
                break
            log.warning("%s: arrived with a wrong checksum", self.source.where(name))
        return True

    def _reserve(self, part: BinaryIO, length: int) -> bool:
        """Give the working file its final length, within the limit; evict others where needed."""
        with open_own(self.root / ".lock", os.O_RDWR | os.O_CREAT) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = sorted(self._files())
            too_much = sum(size for _, _, size in files) + length - self.limit_bytes
            for _, path, size in files if length <= self.limit_bytes else []:
                if too_much <= 0:
                    break
                if _evict(path):
                    too_much -= size
            if too_much > 0:
                return False
            part.truncate(length)
            return True

    def _files(self) -> Iterator[tuple[float, Path, int]]:
        """(time of last opening, path, bytes) of every shard of every dataset, finished or not."""
        for folder in self.root.iterdir():
            for file in os.scandir(folder) if folder.is_dir() and not folder.is_symlink() else ():
                with contextlib.suppress(FileNotFoundError):
                    if file.is_file(follow_symlinks=False):
                        stat = file.stat(follow_symlinks=False)
                        yield stat.st_mtime, Path(file), stat.st_size


class Prefetcher:
    """Fetches shards in the order given, on a thread of its own, and keeps them in the cache until the next order."""

    def __init__(self, cache: ShardCache):
        self._cache = cache
        self._held: dict[str, BinaryIO] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, names: Sequence[str]) -> None:
        """Fetch these, first ones first. While the cache is full of shards in use, wait until some are let go of."""
        self._halt()
        for name in [name for name in self._held if name not in names]:
            self._held.pop(name).close()
        self._stop = threading.Event()
        wanted = [name for name in names if self._cache.fits(name)]
        self._thread = threading.Thread(target=self._run, args=(wanted, self._stop), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._halt()
        for file in self._held.values():
            file.close()
        self._held.clear()

    def _halt(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, names: list[str], stop: threading.Event) -> None:
        left = names
        try:
            while left:
                later = []  # another process is downloading them, or there is no room: looked at again
                for name in left:
                    try:
                        file = self._cache.fetch(name, wait=False, stop=stop)
                    except Busy:
                        later.append(name)
                        continue
                    except Full:  # what is needed later must not keep out what is needed now
                        rest = names[names.index(name) :]
                        later += rest
                        self._let_go(rest)
                        break
                    if file is None:  # it has to stop, or the disk is full
                        return
                    self._let_go([name])  # it may have been discarded since
                    self._held[name] = file
                left = later
                if left and stop.wait(RETRY_S):
                    return
        except (DataError, OSError) as error:
            log.warning("fetching ahead has stopped: %s", error)  # whoever needs the shard meets the same error

    def _let_go(self, names: Sequence[str]) -> None:
        """They stay in the cache while there is room."""
        for name in names:
            if name in self._held:
                self._held.pop(name).close()


def _has_name(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO) -> bool:
    """Take the exclusive lock, unless anybody has a lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _evict(path: Path) -> bool:
    """Delete a file that nobody has locked."""
    with contextlib.suppress(FileNotFoundError), open_own(path) as file:
        if _lock(file):
            path.unlink()
            return True
    return False
