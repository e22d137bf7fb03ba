"""Processes that fill image batches: the loaders' other half.

    loader / sequential ── jobs ──▶ [pool: decoding processes] ── pixels in shared memory ──▶ loader / sequential

Job i goes to process i mod n and into slot i mod s of the shared memory, so results come back in order without any
bookkeeping. One child process imports the libraries and then forks the others, which costs one import for all;
none of them runs the caller's main script again. When the caller dies, its end of the sockets closes and they exit.
"""

import contextlib
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from shards.errors import DataError

Fill = Callable[[Any, np.ndarray], Any]
"""fill(job, slot) writes pixels to the slot, uint8 [slot_bytes], and returns a small picklable result."""
CHILD_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Pool:
    """Runs `fill` over jobs, in order. With no workers it runs in this process, when the result is asked for."""

    def __init__(self, fill: Fill, workers: int, slots: int, slot_bytes: int):
        self._fill, self._workers, self._slot_bytes = fill, workers, slot_bytes
        self._slots = max(slots, 2 * workers) if workers else 1
        self._pending = 0  # jobs sent and not received
        self._started = 0  # jobs ever sent
        self._connections: list[Connection] = []
        self._host: subprocess.Popen | None = None
        self._memory: np.ndarray | None = None

    def run(self, jobs: Iterable[Any]) -> Iterator[tuple[Any, np.ndarray]]:
        """(result, slot) of each job, in order; the slot may be overwritten once the next one is asked for.

        Raises what `fill` raised. An earlier run that was left unfinished is dropped.
        """
        if not self._workers:
            slot = np.empty(self._slot_bytes, np.uint8)
            for job in jobs:
                yield self._fill(job, slot), slot
            return
        if self._host is None:
            self._start()
        self._drop_pending()
        jobs = iter(jobs)
        for job in islice(jobs, self._slots):
            self._send(job)
        while self._pending:
            number = self._started - self._pending
            result = self._receive()
            if isinstance(result, Exception):
                raise result
            yield result, self._slot(number)
            for job in islice(jobs, 1):
                self._send(job)

    def close(self) -> None:
        """End the processes. The pool starts them again when it is used again."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._pending = 0
        self._memory = None
        if self._host is not None:
            self._host.wait()
            self._host = None

    def __del__(self):
        with contextlib.suppress(Exception):
            self.close()

    def _start(self) -> None:
        memory = _memory_file(self._slots * self._slot_bytes)
        ends = [socket.socketpair() for _ in range(self._workers)]
        passed = [memory, *(theirs.fileno() for _, theirs in ends)]
        env = {**os.environ, **CHILD_ENV, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "shards.pool", ",".join(map(str, passed))]
        self._host = subprocess.Popen(command, pass_fds=passed, env=env, stdin=subprocess.DEVNULL)
        self._memory = _shared(memory)
        os.close(memory)
        for ours, theirs in ends:
            theirs.close()
            self._connections.append(Connection(ours.detach()))
        self._started = 0
        for connection in self._connections:
            connection.send((self._fill, self._slot_bytes))

    def _send(self, job: Any) -> None:
        self._connection(self._started).send((self._started % self._slots, job))
        self._started += 1
        self._pending += 1

    def _receive(self) -> Any:
        connection = self._connection(self._started - self._pending)
        try:
            result = connection.recv()
        except (EOFError, ConnectionError) as error:
            self.close()
            raise DataError(
                "a loader process died (out of memory, or a shard was changed or cut while it was read); see its "
                "message above, then lower data.loaders or copy the shards again"
            ) from error
        self._pending -= 1
        return result

    def _drop_pending(self) -> None:
        while self._pending:
            self._receive()

    def _connection(self, number: int) -> Connection:
        return self._connections[number % self._workers]

    def _slot(self, number: int) -> np.ndarray:
        place = number % self._slots
        return self._memory[place * self._slot_bytes : (place + 1) * self._slot_bytes]


def _memory_file(num_bytes: int) -> int:
    """An unnamed file in memory; unlike /dev/shm, which containers keep small, it has no limit of its own."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("clipreid-batches")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, num_bytes)
    return descriptor


def _shared(descriptor: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)


def _host(descriptors: list[int]) -> None:
    """Import once, then one forked process per socket."""
    import shards.loader
    import shards.sequential  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides when to stop
    memory, *sockets = descriptors
    children = {}
    for own in sockets:
        child = os.fork()
        if not child:
            for other in sockets:
                if other != own:
                    os.close(other)
            _serve(Connection(own), _shared(memory))
            os._exit(0)
        children[child] = own
    for own in sockets:
        os.close(own)
    for _ in sockets:
        child, status = os.wait()
        if code := os.waitstatus_to_exitcode(status):
            print(f"loader process {child} ended with exit code {code}", file=sys.stderr, flush=True)


def _serve(connection: Connection, memory: np.ndarray) -> None:
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        fill, slot_bytes = connection.recv()
        while True:
            slot, job = connection.recv()
            try:
                result = fill(job, memory[slot * slot_bytes : (slot + 1) * slot_bytes])
            except Exception as error:
                result = _sendable(error)
            connection.send(result)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    _host([int(number) for number in sys.argv[1].split(",")])
