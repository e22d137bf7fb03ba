"""Where bytes lie: local folders, zip files, and anything fsspec has a URL for.

    images ──▶ [Source] ──▶ datasets, writer ──▶ [write_atomic] ──▶ shards ──▶ verify, loading

A source is read only. What is written appears under its final name complete or not at all.
"""

import contextlib
import errno
import io
import json
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

import fsspec
from fsspec.core import url_to_fs

from shards.errors import DataError, NotAFileError
from shards.leftovers import remove_leftovers, working_name
from shards.remote import RangedFile, Upload, file_system, retried

REQUESTS = 16
"""Files of a remote folder that are asked for at a time."""
NOT_FILES = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 4095
"""Of one part of a path, and of all of it, on the file systems of Linux."""
BYTE_ORDER_MARKS = (
    *((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32")),
    *((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")),
)
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


def is_local(url: str) -> bool:
    """True for plain paths and file:// URLs."""
    return local_path(url) is not None


def local_path(url: str) -> Path | None:
    """The path behind a plain path or file:// URL, None for every other URL."""
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    return None if "://" in url or "::" in url else Path(url)


def path_fault(path: str) -> str:
    """Why no file can have this path or URL, in words; empty where one can."""
    if "\0" in path:
        return "holds a NUL character, which no path can"
    longest = max((len(os.fsencode(part)) for part in path.split("/")), default=0)
    if is_local(path) and longest > MOST_NAME_BYTES:
        return f"has a name of {longest:,} bytes, more than the {MOST_NAME_BYTES} that file systems take"
    if len(os.fsencode(path)) > MOST_PATH_BYTES:
        return f"is longer than the {MOST_PATH_BYTES:,} bytes that systems take"
    return ""


def is_process_local(url: str) -> bool:
    """True where another process of this machine would not see the same files (fsspec's memory:// )."""
    return url.startswith("memory:")


def join(url: str, *names: str) -> str:
    """URL of a file below a folder URL."""
    return "/".join([url.rstrip("/") or "/", *names]) if url != "/" else "/" + "/".join(names)


def exists(url: str) -> bool:
    if is_local(url):
        fs, path = url_to_fs(url)
        return fs.exists(path)
    try:
        return bool(_ask(url, lambda fs, path: fs.info(path)))
    except (FileNotFoundError, NotADirectoryError):
        return False


def size_bytes(url: str) -> int:
    return _ask(url, lambda fs, path: fs.size(path))


def list_folder(url: str) -> list[str]:
    """Sorted names of the files and folders directly below; empty when there is no such folder."""

    def names(fs: Any, path: str) -> list[str]:
        fs.invalidate_cache()
        entries = [entry.rstrip("/") for entry in fs.ls(path, detail=False)]
        return sorted(PurePosixPath(entry).name for entry in entries if entry != path.rstrip("/"))

    try:
        return _ask(url, names)
    except FileNotFoundError:
        return []


def open_read(url: str, block_bytes: int = 8 << 20) -> IO[bytes]:
    """A file to read from the start; raises OSError. block_bytes: the least that is asked of a remote one."""
    path = local_path(url)
    return open_regular(path) if path else io.BufferedReader(RangedFile(url), block_bytes)


def read_bytes(url: str) -> bytes:
    """A whole file; raises OSError, and refuses a local one that is none: a pipe would be waited for without end."""
    path = local_path(url)
    return _read_regular(path) if path else _ask(url, lambda fs, path: fs.cat_file(path))


def _ask(url: str, request: Callable[[Any, str], Any]) -> Any:
    """request(file system, path on it), repeated where the file system is a remote one."""
    if local_path(url) is not None:
        return request(*url_to_fs(url))
    fs, path = file_system(url)
    return retried(url, lambda: request(fs, path))


def read_text(url: str, encoding: str = "utf-8") -> str:
    """A small text file; a UTF-8 byte order mark is dropped. Raises DataError when it is not there."""
    try:
        return decoded(read_bytes(url), url, encoding)
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file") from error


def decoded(data: bytes, where: str, encoding: str = "utf-8") -> str:
    """The text of a file; a byte order mark is dropped. Raises DataError with the line that is of another encoding."""
    for mark, name in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            raise DataError(f"{where}, line 1: is {name} text; save it as {encoding.upper()}")
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where}, line {line}: is not {encoding.upper()} text ({error.reason} at byte {error.start}); save it as "
            f"{encoding.upper()}"
        ) from error


def make_folder(url: str) -> None:
    """The folder with all above it; nothing happens when it is there. On a disk their names are there to stay."""
    path = local_path(url)
    if path is None:
        _ask(url, lambda fs, path: fs.makedirs(path, exist_ok=True))
        return
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(new):
        sync_folder(folder.parent)


def sync(descriptor: int) -> None:
    """Return when an open file, or the names in an open folder, are on the disk. Raises OSError where they cannot be;
    what has no such thing is taken at its word."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def remove(url: str) -> None:
    """Delete a file or a folder with all below it; nothing happens when there is none."""
    if path := local_path(url):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    if exists(url):
        with contextlib.suppress(FileNotFoundError):
            _ask(url, lambda fs, path: fs.rm(path, recursive=True))


@contextmanager
def naming(place: str | os.PathLike) -> Iterator[None]:
    """What the operating system refuses in the block is told with this path, where it names none: a write into an open
    file that finds the disk full does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(place)
        raise


def require_writable(path: Path) -> None:
    """Raises OSError where `write_atomic` could not write that file: what refuses it is asked, by writing nothing."""
    working = path.parent / working_name(path.name)
    working.touch(exist_ok=False)
    working.unlink()


@contextmanager
def write_atomic(url: str, work: str | None = None, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write that gets its name only when the block ends without an exception.

    work: folder of the working file, on the same file system; default is the file's own folder.
    durable: file and name are on the disk when this returns, so that what comes after may rely on them; not for what
    is written often and can be missed.
    Object stores show an upload only when it is complete, and keep it, so there the upload is the working file.
    """
    target = local_path(url)
    if target is None:
        upload = Upload(url)
        try:
            yield cast(IO[bytes], upload)  # it passes on what fsspec's file can do
        except BaseException:
            upload.discard()
            raise
        upload.commit()
        return
    folder = (local_path(work) if work else None) or target.parent
    if durable:
        remove_leftovers(folder, target.name)
    working = folder / working_name(target.name)
    try:
        with naming(target), working.open("wb") as file:
            yield file
            if durable:
                file.flush()
                sync(file.fileno())
        working.replace(target)
        if durable:
            sync_folder(target.parent)
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
        self._is_zip = self.root.lower().endswith(".zip")
        if self._is_zip:
            self._fs, self._base = _open_zip(self.root), ""
        else:
            self._fs, base = file_system(self.root)
            self._base = base.rstrip("/") + "/"
        self._local = local_path(self.root) if not self._is_zip else None
        if self._local and not self._local.is_dir():
            raise DataError(f"{self.root}: no such folder" + (" (it is a file)" if self._local.exists() else ""))
        self._sizes: dict[str, int] = {}
        self.left_out: set[str] = set()
        """Files that a parser met in its image folders and took for no images."""
        self.notes: list[str] = []
        """What a parser has to say of how it read them, a line each."""

    def __reduce__(self):
        return Source, (self.root,)

    def has(self, path: str) -> bool:
        try:
            return bool(self._ask(path, self._fs.info))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def read(self, path: str) -> bytes:
        """A file's bytes; raises OSError (FileNotFoundError, StoreError, ...)."""
        if self._local:
            return _read_regular(self._local / path)
        return self._ask(path, self._fs.cat_file)

    def read_start(self, path: str, num_bytes: int) -> bytes:
        """A file's first bytes, fewer where it is shorter, none where it cannot be read: to see what kind it is."""
        try:
            if self._local:
                with open_regular(self._local / path) as file:
                    return file.read(num_bytes)
            return self._ask(path, lambda full: self._fs.cat_file(full, start=0, end=num_bytes))
        except (OSError, ValueError):
            return b""

    def read_text(self, path: str, encoding: str = "utf-8") -> str:
        """A small text file of the dataset; raises DataError when it is not there."""
        try:
            return decoded(self.read(path), join(self.root, path), encoding)
        except FileNotFoundError as error:
            raise DataError(f"{join(self.root, path)}: no such file; it belongs to the dataset") from error

    def files(self, folder: str = "") -> list[str]:
        """Paths of all files below a folder, sorted; empty when there is no such folder."""
        if self._local:
            found = dict(_walk(self._local / folder, f"{folder}/" if folder else ""))
        else:
            start, listed = self._base + folder, {}
            # else the walk over HTTP leaves out the folders whose listing fails
            strict = {"on_error": "raise"} if self.root.startswith("http") else {}
            with contextlib.suppress(FileNotFoundError):
                listed = self._ask(folder, lambda path: self._fs.find(path, detail=True, **strict))
            found = {
                name.removeprefix(self._base): int(entry["size"] or 0)
                for name, entry in listed.items()
                if name != start
            }
        self._sizes |= {path: size for path, size in found.items() if size is not None}
        return sorted(found)

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """Bytes of each file, from the listing where it was listed; None where there is no such file."""
        if self._is_zip and not self._sizes:
            self.files()
        unknown = [path for path in paths if path not in self._sizes]
        if self._local:
            self._sizes |= {path: size for path in unknown if (size := _stat_size(self._local / path)) is not None}
        elif unknown and not self._is_zip:
            with ThreadPoolExecutor(REQUESTS) as pool:
                sizes = pool.map(self._remote_size, unknown)
                self._sizes |= {path: size for path, size in zip(unknown, sizes, strict=True) if size is not None}
        return [self._sizes.get(path) for path in paths]

    def _remote_size(self, path: str) -> int | None:
        try:
            return int(self._ask(path, self._fs.size) or 0)
        except FileNotFoundError:
            return None

    def _ask(self, path: str, request: Callable[[str], Any]) -> Any:
        """request(path on the file system), repeated where that is a remote one."""
        if self._is_zip:
            try:
                return request(path)
            except BAD_ZIP as error:
                raise OSError(f"the zip file is damaged there, or needs a password ({error})") from error
        return retried(join(self.root, path), lambda: request(self._base + path))


def _open_zip(root: str) -> Any:
    """The file system in a zip file; raises DataError."""
    if not exists(root):
        raise DataError(f"{root}: no such file")
    if path := local_path(root):
        _require_file(path)
    try:  # a remote one in small pieces: its images are read one by one
        file = root if is_local(root) else open_read(root, block_bytes=1 << 16)
        return fsspec.filesystem("zip", fo=file, skip_instance_cache=True)
    except BAD_ZIP as error:
        raise DataError(f"{root}: not a readable zip file ({error}); fetch it again") from error


def open_regular(path: Path) -> BinaryIO:
    """A local file to read; raises OSError, NotAFileError for a pipe, socket or device: what is none is not waited
    for."""
    _require_file(path)
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it was replaced meanwhile
        file.close()
        raise NotAFileError(f"{path}: not a file")
    return file


def _read_regular(path: Path) -> bytes:
    with naming(path), open_regular(path) as file:
        return file.read()


def _require_file(path: Path) -> None:
    """Raise NotAFileError for a pipe, socket or device, before it is opened, and FileNotFoundError."""
    mode = path.stat().st_mode
    for check, name in NOT_FILES:
        if check(mode):
            raise NotAFileError(f"{path}: {name}, not a file")
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def _stat_size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _walk(folder: Path, prefix: str, above: frozenset = frozenset()) -> Iterator[tuple[str, int | None]]:
    """(path, bytes) of all files below; bytes is None for a link to nothing.

    above: device and inode of the folders that this one lies in.
    """
    try:
        this, entries = folder.stat(), list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    inside = above | {(this.st_dev, this.st_ino)}
    if len(inside) == len(above):
        raise DataError(f"{folder}: lies in itself, by a link; remove the link")
    for entry in entries:
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", inside)
        else:
            yield prefix + entry.name, _stat_size(Path(entry.path)) if entry.is_symlink() else entry.stat().st_size
