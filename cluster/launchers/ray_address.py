"""Whether a Ray cluster can be there, asked before Ray is: it waits for minutes, or ends in its own story.

RAY_ADDRESS ──▶ [ray address] ──▶ ray.init, or one ConfigError with cause and remedy
"""

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import ConfigError
from shards.errors import masked

ANSWER_S = 15.0
"""How long an address is tried: a cluster may be about to start."""
JOIN_S = 60.0
"""How long Ray may take to join a cluster whose address answers; it takes seconds."""
UNSET = "unset RAY_ADDRESS to start Ray on this machine"
CURRENT = Path("ray") / "ray_current_cluster"
"""Below Ray's temporary folder: what RAY_ADDRESS=auto stands for."""


def check_address(address: str, answer_s: float = ANSWER_S) -> None:
    """Raises ConfigError where no cluster can be at what RAY_ADDRESS says. "local" is this machine."""
    if address == "local" or address.startswith("ray://"):
        return
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={masked(address)}: is the address of a dashboard, where jobs are submitted "
            "(`ray job submit --address`); a run joins HOST:PORT of the head, such as 10.0.0.1:6379: set that, or "
            f"{UNSET}"
        )
    found = _current_cluster() if address in ("auto", "") else address
    if not found:
        raise ConfigError(f"RAY_ADDRESS={address}: no cluster was started on this machine; start one, or {UNSET}")
    host, _, port = found.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"RAY_ADDRESS={found}: is not HOST:PORT, such as 10.0.0.1:6379: mend it, or {UNSET}")
    if fault := _fault(host, int(port), answer_s):
        which = f" (the last cluster of this machine, {found})" if found != address else ""
        raise ConfigError(
            f"RAY_ADDRESS={address}{which}: no Ray cluster answers there ({fault}): start it, correct the address, or "
            f"{UNSET}"
        )


def _current_cluster() -> str:
    for folder in (os.environ.get("RAY_TMPDIR"), "/tmp"):
        with contextlib.suppress(OSError, TypeError):
            return (Path(folder or "") / CURRENT).read_text().strip()
    return ""


def _fault(host: str, port: int, answer_s: float) -> str:
    """Why nothing answers, when it has been tried for so long; empty where something does."""
    until = time.monotonic() + answer_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(1.0, min(5.0, answer_s))):
                return ""
        except socket.gaierror as error:
            return f"{host}: {(error.strerror or str(error)).lower()}"
        except OSError as error:
            fault = (error.strerror or str(error)).lower()
        if time.monotonic() > until:
            return fault
        time.sleep(0.5)


@contextlib.contextmanager
def within_time(what: str, seconds: float = JOIN_S) -> Iterator[None]:
    """End the process with one line where the block does not: Ray waits inside, where nothing can interrupt it."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(seconds):
            print(
                f"error: {what}: no answer for {seconds:.0f} s, so no Ray cluster; {UNSET}", file=sys.stderr, flush=True
            )
            os._exit(2)

    threading.Thread(target=watch, name="Ray's time limit", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def cause_of(text: str) -> str:
    """The one line of Ray's story of a failure that says why: of memory that ran out, of a traceback, of a death."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return "no reason given"
    if memory := next((line for line in lines if MEMORY.search(line)), ""):
        return (
            f"killed because its node ran out of memory ({memory[:300]}): lower data.loaders, cluster.workers, "
            "eval.batch or the batch, or use nodes with more memory"
        )
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        return lines[-1]
    death = next((line for line in lines if DEATH.search(line)), "")
    return death[:400] or lines[-1]


MEMORY = re.compile(r"out of memory|low on memory|OUT_OF_MEMORY|OOM", re.IGNORECASE)
DEATH = re.compile(r"is dead because|has died|died because|exit type|exit detail")
