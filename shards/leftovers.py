"""Working files that say whose they are, and the removal of those that a dead process left.

    write_atomic ──▶ [working_name] ──▶ .NAME.PLACE.PID.RANDOM ──▶ [remove_leftovers], at the next start

Files of any other name are nobody's business here. PLACE is where the number PID counts: one host, one process
namespace. Of processes elsewhere (another host, a container, an earlier version) nothing is known here, so what they
left goes when nobody has written to it for a day.
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


def working_name(name: str) -> str:
    """A new name beside `name`, that tells which process writes to it."""
    return f".{name}.{number_space()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


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
    if found["place"] == number_space():
        return not is_running(int(found["pid"]))
    with contextlib.suppress(OSError):
        return time.time() - path.lstat().st_mtime > ABANDONED_S
    return False


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@cache
def number_space() -> str:
    """Where this process's number counts, 12 hex digits: containers that share a folder, and may share a host's name,
    have the same numbers."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:12]


def is_running(pid: int) -> bool:
    """Whether there is such a process, anybody's, in this process's number space."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True
