"""Working files that say whose they are, and the removal of those that a dead process left.

    write_atomic ──▶ [working_name] ──▶ .NAME.PLACE.PID.RANDOM ──▶ [remove_leftovers], at the next start

Files of any other name are nobody's business here. A process can be judged from where its number counts: on the same
host, in the same process namespace. What came from elsewhere (another host, a container, an earlier version) goes
when nobody has written to it for a day.
"""

import contextlib
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from functools import cache
from pathlib import Path

ABANDONED_S = 86_400.0
_NAME = re.compile(r"\.(?P<name>.+?)(?:\.(?P<place>[0-9a-f]{12}))?\.(?P<pid>\d+)(?:\.[0-9a-f]{8})", re.DOTALL)


@cache
def _place() -> str:
    """Where this process's number counts: containers that share a folder have the same numbers."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:12]


def working_name(name: str) -> str:
    """A new name beside `name`, that tells which process writes to it."""
    return f".{name}.{_place()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what dead processes left in a local folder under names of `working_name`, of `name` alone where given.

    What cannot be removed stays.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            found = _NAME.fullmatch(path.name)
            if found and name in (None, found["name"]) and _is_abandoned(path, found):
                _remove(path)


def _is_abandoned(path: Path, found: re.Match[str]) -> bool:
    if found["place"] == _place():
        return not _runs(int(found["pid"]))
    with contextlib.suppress(OSError):
        return time.time() - path.lstat().st_mtime > ABANDONED_S
    return False


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
