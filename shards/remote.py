"""Requests to remote stores: repeated while they fail, and in the end one line says what failed.

    storage (whole files, folders), source (ranges of shards) ──▶ [remote] ──▶ any fsspec file system

fsspec's file systems have their own types for a broken connection and a refusal; here they become StoreError.
"""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fsspec.core import url_to_fs

from shards.errors import AccessError, DataError, StoreError

if TYPE_CHECKING:
    from typing_extensions import Buffer

Result = TypeVar("Result")
FINAL = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, NotImplementedError)
"""What no repetition changes."""


class Patience(NamedTuple):
    """How long a request is repeated. Some stores repeat it themselves, so the time counts too."""

    attempts: int
    seconds: float


OPEN = Patience(7, 10)
"""For the first files of a run: 3 s of pauses, so that a mistyped address shows soon."""
READ = Patience(10, 60)
"""For images: 26 s of pauses, so that a run survives a short failure of the store."""
FIRST_PAUSE_S = 0.05
"""Doubles after every attempt."""
REMEDY = "check the address and the network"


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path on it. Raises StoreError for an unknown or unusable protocol."""
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise StoreError(f"{url}: can't be opened ({error}); check the address, or install what it needs") from error


def retried(where: str, request: Callable[[], Result], patience: Patience = OPEN) -> Result:
    """request(), repeated with growing pauses while it fails.

    Raises what no repetition changes (FileNotFoundError, ...) as it comes, and StoreError for the rest: at once
    where access is refused.
    """
    give_up = time.monotonic() + patience.seconds
    for attempt in range(1, patience.attempts + 1):
        try:
            return request()
        except Exception as error:  # every fsspec backend has its own types for a broken connection
            failure = _failure(error)
        if isinstance(failure, (*FINAL, DataError)):
            raise failure
        _raise_refusal(where, failure)
        if attempt == patience.attempts or time.monotonic() > give_up:
            break
        time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
    raise StoreError(f"{where}: failed {attempt} times, at last with {_one_line(failure)}; {REMEDY}") from failure


@contextmanager
def as_store_error(where: str) -> Iterator[None]:
    """Failures of a request that can't be repeated, as StoreError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        _raise_refusal(where, error)
        raise StoreError(f"{where}: failed with {_one_line(error)}; {REMEDY}") from error


def _failure(error: Exception) -> BaseException:
    """What really went wrong: fsspec's HTTP calls every failure to look a file up a missing file."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None or getattr(cause, "status", None) in (404, 410):
        return error
    return cause if type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError) else error


def _raise_refusal(where: str, error: BaseException) -> None:
    refused = isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)
    if refused or "Credential" in type(error).__name__:
        raise AccessError(f"{where}: access denied ({_one_line(error)}); check the credentials") from error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def read_range(fs: Any, path: str, start: int, stop: int) -> bytes:
    """Exactly bytes start ... stop-1, with one request. Raises OSError when others come."""
    data = fs.cat_file(path, start=start, end=stop)
    if len(data) > stop - start:
        raise OSError("the server ignores range requests")
    if len(data) < stop - start:
        raise OSError(f"only {len(data)} of {stop - start} bytes came")
    return data


class RangedFile(io.RawIOBase):
    """A remote file to read and seek in; every read is one range, repeated while it fails."""

    def __init__(self, url: str):
        """Raises FileNotFoundError, StoreError."""
        self.url, self.position = url, 0
        self._fs, self._path = file_system(url)
        size = retried(url, lambda: self._fs.info(self._path)["size"])
        if size is None:
            raise StoreError(f"{url}: the server does not tell how long it is; copy it to a local folder first")
        self.size = int(size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: "Buffer") -> int:
        view = memoryview(buffer)
        start, stop = self.position, min(self.position + len(view), self.size)
        if start >= stop:
            return 0
        data = retried(self.url, lambda: read_range(self._fs, self._path, start, stop), READ)
        view[: len(data)] = data
        self.position = stop
        return len(data)


class Upload:
    """A remote file that is written; its failures are StoreError."""

    def __init__(self, url: str):
        self.url = url
        fs, path = file_system(url)
        with as_store_error(url):
            self._file = fs.open(path, "wb", autocommit=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        with as_store_error(self.url):
            return self._file.write(data)

    def commit(self) -> None:
        with as_store_error(self.url):
            self._file.close()
            self._file.commit()
