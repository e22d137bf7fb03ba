"""Whether the process that left something behind still runs.

    leftovers, owner ──▶ [liveness]

A process's number counts where it was given: on one host, in one process namespace. Of processes elsewhere nothing is
known here.
"""

import hashlib
import os
import socket
from functools import cache
from pathlib import Path


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
