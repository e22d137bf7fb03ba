"""One living writer: a mark beside what is being written refuses a second process, and stands in nobody's way once
its own is dead.

    build, training, results ──▶ [owner: take, hold, let go] ──▶ .owner in a folder, .NAME.owner beside a file

On a local or mounted file system the mark is a file with a lock, which the kernel takes back when the process ends,
however it ends. Object stores have no locks: there the mark holds a counter that its writer raises every BEAT_S
seconds, and one that has stood still for STALE_S seconds is a dead writer's.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

from shards import storage
from shards.errors import DataError
from shards.leftovers import is_running, number_space

log = logging.getLogger(__name__)
BEAT_S = 5.0
STALE_S = 4 * BEAT_S
SETTLE_S = 1.0
"""Two writers that found no mark both write one; after this long each reads whose has stayed."""
REFUSED = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[str] = set()  # by this process, whose own locks do not exclude each other


class OwnedError(DataError):
    """Another process is writing there."""


def owned_folder(url: str, doing: str) -> AbstractContextManager[None]:
    """While the block runs nobody else writes into the folder, a path or URL. doing: "training", "packing", ...

    Raises OwnedError, which names the other process and its age.
    """
    storage.make_folder(url)
    return _owned(storage.join(url, ".owner"), url, doing)


def owned_file(url: str, doing: str) -> AbstractContextManager[None]:
    """The same for one file, or a folder that is written as one. Raises OwnedError."""
    folder, slash, name = url.rstrip("/").rpartition("/")
    return _owned(f"{folder}{slash}.{name}.owner", url, doing)


@contextmanager
def _owned(mark: str, url: str, doing: str) -> Iterator[None]:
    path = storage.local_path(mark)
    place = str(path.resolve()) if path else mark
    if place in _held:
        raise OwnedError(f"{url}: this process is writing there already ({doing})")
    with _locked(path, url, doing) if path else _beating(mark, url, doing):
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)


@contextmanager
def _locked(path: Path, url: str, doing: str) -> Iterator[None]:
    try:
        file = _lock(path, url)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        with _beating(str(path), url, doing):  # a mount that has no locks is as good as an object store
            yield
        return
    try:
        with storage.naming(path):
            file.truncate(0)
            file.write(json.dumps(_facts(doing)).encode())
            file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is unlocked: whoever waits for it sees that it has no name
        file.close()


def _lock(path: Path, url: str) -> IO[bytes]:
    while True:
        file = path.open("a+b")
        try:
            # A lock of the process, not of the open file: children that outlive it do not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(file, path):
                return file
        except OSError as error:
            if error.errno in REFUSED:
                raise _refusal(url, _parsed(path.read_bytes() if path.exists() else b"")) from None
            raise
        file.close()


def _is_named(file: IO[bytes], path: Path) -> bool:
    """Whether the file still has its name: its last owner removes it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _beating(mark: str, url: str, doing: str) -> Iterator[None]:
    facts = _facts(doing)
    _wait_for_the_dead(mark, url)
    _write(mark, facts)
    time.sleep(SETTLE_S)
    if (there := _read(mark)).get("token") != facts["token"]:
        raise _refusal(url, there)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(mark, facts, ended), daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        if _read(mark).get("token") == facts["token"]:
            storage.remove(mark)


def _wait_for_the_dead(mark: str, url: str) -> None:
    """Return when there is no mark, or one whose process is dead. Raises OwnedError when it is alive."""
    first = _read(mark)
    if not first or _has_ended(first):
        return
    log.warning("%s: has the mark of %s; looking for %g s whether it is alive", url, _who(first), STALE_S)
    until = time.monotonic() + STALE_S
    while time.monotonic() < until:
        time.sleep(min(1.0, BEAT_S / 4))
        now = _read(mark)
        if not now:
            return
        if now != first:
            raise _refusal(url, now)


def _beat(mark: str, facts: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        facts["beat"] += 1
        with contextlib.suppress(OSError, DataError):  # a store that is away for a while: the next beat tells
            _write(mark, facts)


def _facts(doing: str) -> dict[str, Any]:
    process = {"host": socket.gethostname(), "place": number_space(), "pid": os.getpid()}
    return {"doing": doing, **process, "since": time.time(), "token": uuid.uuid4().hex, "beat": 0}


def _has_ended(facts: dict[str, Any]) -> bool:
    """Whether its process is known to be no more. A mark that does not tell is waited for."""
    pid = facts.get("pid")
    return facts.get("place") == number_space() and isinstance(pid, int) and not is_running(pid)


def _write(mark: str, facts: dict[str, Any]) -> None:
    with storage.write_atomic(mark, durable=False) as file:
        file.write(json.dumps(facts).encode())


def _read(mark: str) -> dict[str, Any]:
    try:
        return _parsed(storage.read_bytes(mark))
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _parsed(data: bytes) -> dict[str, Any]:
    """The facts of a mark; of one that is not whole yet, or damaged, nothing but that it is there."""
    try:
        facts = json.loads(data)
    except ValueError:
        facts = None
    return facts if isinstance(facts, dict) else {"doing": "writing"}


def _who(facts: dict[str, Any]) -> str:
    return f"process {facts.get('pid', '?')} on {facts.get('host', 'a host that it does not name yet')}"


def _refusal(url: str, facts: dict[str, Any]) -> OwnedError:
    since = facts.get("since")
    age = f", since {max(time.time() - since, 0):.0f} s" if isinstance(since, int | float) else ""
    return OwnedError(
        f"{url}: {_who(facts)} is {facts.get('doing', 'writing')} there{age}: wait until it ends or stop it, or "
        "name another place"
    )
