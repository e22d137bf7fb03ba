"""Working files that say whose they are, and the removal of those that a dead process left.

    write_atomic ──▶ [working_name] ──▶ .NAME.PLACE.PID.RANDOM ──▶ [remove_leftovers], at the next start

Files of any other name are nobody's business here. PLACE is where the number PID counts (`liveness.py`). What came from
elsewhere (another host, a container, an earlier version) goes
when nobody has written to it for a day.
"""

import contextlib
import os
import re
import shutil
import time
import uuid
from pathlib import Path

from shards.liveness import is_running, number_space

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
