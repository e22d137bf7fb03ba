"""Processes that fill image batches: the loaders' other half.

    loader / sequential ── jobs ──▶ [pool: decoding processes] ── pixels in shared memory ──▶ loader / sequential

Job i goes to process i mod n and into slot i mod s of the shared memory, so results come back in order without any
bookkeeping. One host process (`pool_host.py`) imports the libraries once and forks all decoding processes of the
caller; none of them runs the caller's main script again. When the caller dies, its ends of the sockets close, and
they exit.
"""

import contextlib
import mmap
import os
import pickle
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from shards.errors import DataError
from shards.loading import forkserver as pool_host

Fill = Callable[[Any, np.ndarray], Any]
"""fill(job, slot) writes pixels to the slot, uint8 [slot_bytes], and returns a small picklable result."""


class Pool:
    """Runs `fill` over jobs, in order. With no workers it runs in this process, when a result is asked for."""

    def __init__(self, fill: Fill, workers: int, slots: int, slot_bytes: int):
        """slots: jobs that the workers may be ahead; at least two for each, so that none waits for the caller."""
        self._fill, self._workers, self._slot_bytes = fill, workers, slot_bytes
        self._slots = max(slots, 2 * workers)
        self._connections: list[Connection] = []
        self._memory: np.ndarray | None = None
        self._sent = self._received = 0
        if workers:
            pool_host.start()  # its imports run beside what the caller does next

    def run(self, jobs: Iterable[Any]) -> Iterator[tuple[Any, np.ndarray]]:
        """(result, slot) of each job, in order; the slot may be overwritten once the next one is asked for.

        Raises what `fill` raised. An earlier run that was left unfinished is dropped.
        """
        if not self._workers:
            slot = np.empty(self._slot_bytes, np.uint8)
            for job in jobs:
                yield self._fill(job, slot), slot
            return
        if not self._connections:
            self._start()
        while self._received < self._sent:
            self._receive()
        jobs = iter(jobs)
        for job in islice(jobs, self._slots):
            self._send(job)
        while self._received < self._sent:
            slot = self._received % self._slots * self._slot_bytes
            result = self._receive()
            if isinstance(result, Exception):
                raise result
            yield result, self._memory[slot : slot + self._slot_bytes]
            for job in islice(jobs, 1):
                self._send(job)

    def close(self) -> None:
        """End the processes. They start anew when the pool is used again."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._sent = self._received = 0
        self._memory = None

    def __del__(self):
        with contextlib.suppress(Exception):
            self.close()

    def _start(self) -> None:
        descriptor = _memory_file(self._slots * self._slot_bytes)
        ends = [socket.socketpair() for _ in range(self._workers)]
        pool_host.fork(descriptor, [theirs.fileno() for _, theirs in ends])
        self._memory = shared_memory(descriptor)
        os.close(descriptor)
        for ours, theirs in ends:
            theirs.close()
            self._connections.append(Connection(ours.detach()))
        for number in range(self._workers):
            self._tell(number, (dict(os.environ), pickle.dumps(self._fill), self._slot_bytes))

    def _send(self, job: Any) -> None:
        self._tell(self._sent % self._workers, (self._sent % self._slots, job))
        self._sent += 1

    def _tell(self, worker: int, message: Any) -> None:
        with self._death_explained():
            self._connections[worker].send(message)

    def _receive(self) -> Any:
        with self._death_explained():
            result = self._connections[self._received % self._workers].recv()
        self._received += 1
        return result

    @contextlib.contextmanager
    def _death_explained(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self.close()
            raise DataError(
                "a decoding process died: out of memory, or a shard was cut while it was read (its exit code is "
                "printed above); lower data.loaders, or copy the shards again"
            ) from error


def _memory_file(num_bytes: int) -> int:
    """An unnamed file in memory. /dev/shm would do as well, but containers keep it small."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("image-batches")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, num_bytes)
    return descriptor


def shared_memory(descriptor: int) -> np.ndarray:
    """uint8, the whole file, shared with every process that maps it."""
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)
