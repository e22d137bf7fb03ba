"""Where bytes lie: local folders, zip files, and anything fsspec has a URL for.

    [Source] -> parsers, pack          pack -> [write_atomic, ...] -> shards -> verify, readers

A source is read only. What is written appears under its final name complete or not at all.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from shards.errors import DataError


def is_local(url: str) -> bool:
    """True for plain paths and file:// URLs."""
    return local_path(url) is not None


def local_path(url: str) -> Path | None:
    """The path behind a plain path or file:// URL, None for every other URL."""
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    return None if "://" in url or "::" in url else Path(url)


def is_process_local(url: str) -> bool:
    """True where another process of this machine would not see the same files (fsspec's memory:// )."""
    return url.startswith("memory:")


def join(url: str, *names: str) -> str:
    """URL of a file below a folder URL."""
    return "/".join([url.rstrip("/") or "/", *names]) if url != "/" else "/" + "/".join(names)


def exists(url: str) -> bool:
    fs, path = url_to_fs(url)
    return fs.exists(path)


def size_bytes(url: str) -> int:
    fs, path = url_to_fs(url)
    return fs.size(path)


def list_folder(url: str) -> list[str]:
    """Sorted names of the files and folders directly below; empty when there is no such folder."""
    fs, path = url_to_fs(url)
    fs.invalidate_cache()
    try:
        entries = [entry.rstrip("/") for entry in fs.ls(path, detail=False)]
    except FileNotFoundError:
        return []
    return sorted(PurePosixPath(entry).name for entry in entries if entry != path.rstrip("/"))


def open_read(url: str) -> IO[bytes]:
    """A file to read from the start; raises FileNotFoundError."""
    path = local_path(url)
    return path.open("rb") if path else fsspec.open(url, "rb").open()


def read_bytes(url: str) -> bytes:
    with open_read(url) as file:
        return file.read()


def read_text(url: str, encoding: str = "utf-8") -> str:
    """A small text file; a UTF-8 byte order mark is dropped. Raises DataError when it is not there."""
    try:
        return read_bytes(url).decode(encoding).removeprefix("\ufeff")
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: not {encoding} text ({error.reason} at byte {error.start})") from error


def make_folder(url: str) -> None:
    fs, path = url_to_fs(url)
    fs.makedirs(path, exist_ok=True)


def remove(url: str) -> None:
    """Delete a file or a folder with all below it; nothing happens when there is none."""
    if path := local_path(url):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    fs, path = url_to_fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


@contextmanager
def write_atomic(url: str, work: str | None = None) -> Iterator[IO[bytes]]:
    """A file to write that gets its name only when the block ends without an exception.

    work: folder of the working file, on the same file system; default is the file's own folder.
    Object stores show an upload only when it is complete, so there the upload is the working file.
    """
    target = local_path(url)
    if target is None:
        fs, path = url_to_fs(url)
        file = fs.open(path, "wb", autocommit=False)
        try:
            yield file
        except BaseException:
            file.discard()
            raise
        file.close()
        file.commit()
        return
    working = (local_path(work) if work else target.parent) / f".{target.name}.{os.getpid()}"
    try:
        with working.open("wb") as file:
            yield file
        working.replace(target)
    except BaseException:
        working.unlink(missing_ok=True)
        raise


def write_json(url: str, value: Any, work: str | None = None) -> None:
    """Readable JSON with the keys in the order given, so that equal values are equal bytes."""
    with write_atomic(url, work) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


class Source:
    """The files below one root: a folder or a zip file, local or behind an fsspec URL.

    Paths are posix and relative to the root. Pickles as its root and is opened anew in another process.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = os.fspath(root)
        if self.root.lower().endswith(".zip"):
            if not exists(self.root):
                raise DataError(f"{self.root}: no such file")
            self._fs, self._base = fsspec.filesystem("zip", fo=self.root), ""
        else:
            self._fs, base = url_to_fs(self.root)
            self._base = base.rstrip("/") + "/"
        self._local = local_path(self.root) if not self.root.lower().endswith(".zip") else None
        if self._local and not self._local.is_dir():
            raise DataError(f"{self.root}: no such folder" + (" (it is a file)" if self._local.exists() else ""))
        self._sizes: dict[str, int] = {}

    def __reduce__(self):
        return Source, (self.root,)

    def has(self, path: str) -> bool:
        return self._fs.exists(self._base + path)

    def read(self, path: str) -> bytes:
        """A file's bytes; raises OSError (FileNotFoundError) as the file system does."""
        if self._local:
            return (self._local / path).read_bytes()
        return self._fs.cat_file(self._base + path)

    def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """A small text file of the dataset; raises DataError when it is not there."""
        try:
            return self.read(path).decode(encoding).removeprefix("\ufeff")
        except FileNotFoundError as error:
            raise DataError(f"{join(self.root, path)}: no such file; it belongs to the dataset") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{join(self.root, path)}: not {encoding} text") from error

    def files(self, folder: str = "") -> list[str]:
        """Paths of all files below a folder, sorted; empty when there is no such folder."""
        if self._local:
            found = dict(_walk(self._local / folder, f"{folder}/" if folder else ""))
        else:
            start = self._base + folder
            found = {
                name.removeprefix(self._base): int(entry["size"] or 0)
                for name, entry in self._fs.find(start, detail=True).items()
                if name != start
            }
        self._sizes |= found
        return sorted(found)

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """Bytes of each file, from the listing where it was listed; None where there is no such file."""
        unknown = [path for path in paths if path not in self._sizes]
        if self._local:
            self._sizes |= {path: size for path in unknown if (size := _stat_size(self._local / path)) is not None}
        elif unknown:
            self._sizes |= self._remote_sizes(unknown)
        return [self._sizes.get(path) for path in paths]

    def _remote_sizes(self, paths: Sequence[str]) -> dict[str, int]:
        try:  # many at a time, where the file system can
            found = self._fs.sizes([self._base + path for path in paths])
            return {path: int(size or 0) for path, size in zip(paths, found, strict=True)}
        except FileNotFoundError:
            return {p: int(self._fs.size(self._base + p) or 0) for p in paths if self._fs.exists(self._base + p)}


def _stat_size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry.stat().st_size
