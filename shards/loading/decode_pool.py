"""Processes that fill image batches: the loaders' other half.

    loaders ── jobs ──▶ [decode pool: decoding processes] ── pixels in shared memory ──▶ loaders

Job i goes to process i mod n and into slot i mod s of the shared memory, so results come back in order without any
bookkeeping. One process (`forkserver.py`) imports the libraries once and forks all decoding processes of the caller;
none of them runs the caller's main script again. When the caller dies, its ends of the sockets close, and they exit.
"""

import contextlib
import math
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
from shards.loading import forkserver

Fill = Callable[[Any, np.ndarray], Any]
"""fill(job, slot) writes pixels to the slot, uint8 of the pool's slot_shape, and returns a small picklable result."""


class DecodePool:
    """Runs `fill` over jobs, in order. Without loaders it runs in this process, when a result is asked for."""

    def __init__(self, fill: Fill, preload: str, slot_shape: tuple[int, ...], num_loaders: int, num_slots: int):
        """
        Args:
            preload: the module that `fill` needs, imported once for all decoding processes.
            slot_shape: of the pixels of one job, uint8.
            num_loaders: decoding processes.
            num_slots: jobs that they may be ahead; at least two for each, so that none waits for the caller.
        """
        self._fill, self._slot_shape, self._num_loaders = fill, slot_shape, num_loaders
        self._num_slots = max(num_slots, 2 * num_loaders)
        self._connections: list[Connection] = []
        self._slots: np.ndarray | None = None
        self._sent = self._received = 0
        if num_loaders:
            forkserver.start(preload)  # its imports run beside what the caller does next

    def run(self, jobs: Iterable[Any]) -> Iterator[tuple[Any, np.ndarray]]:
        """(result, slot) of each job, in order; the slot may be overwritten once the next one is asked for.

        Raises what `fill` raised. An earlier run that was left unfinished is dropped.
        """
        if not self._num_loaders:
            slot = np.empty(self._slot_shape, np.uint8)
            for job in jobs:
                yield self._fill(job, slot), slot
            return
        if self._slots is None:
            self._slots = self._start()
        while self._received < self._sent:
            self._receive()
        jobs, slots = iter(jobs), self._slots
        for job in islice(jobs, self._num_slots):
            self._send(job)
        while self._received < self._sent:
            slot = slots[self._received % self._num_slots]
            result = self._receive()
            if isinstance(result, Exception):
                raise result
            yield result, slot
            for job in islice(jobs, 1):
                self._send(job)

    def close(self) -> None:
        """End the processes. They start anew when the pool is used again."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._sent = self._received = 0
        self._slots = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _start(self) -> np.ndarray:
        """Start the processes; returns the slots, uint8 [num_slots, *slot_shape]."""
        descriptor = _memory_file(self._num_slots * math.prod(self._slot_shape))
        ends = [socket.socketpair() for _ in range(self._num_loaders)]
        forkserver.fork(descriptor, [theirs.fileno() for _, theirs in ends])
        memory = forkserver.shared_memory(descriptor)
        os.close(descriptor)
        for ours, theirs in ends:
            theirs.close()
            self._connections.append(Connection(ours.detach()))
        for number in range(self._num_loaders):
            self._send_to(number, (dict(os.environ), pickle.dumps(self._fill), self._slot_shape))
        return memory.reshape(-1, *self._slot_shape)

    def _send(self, job: Any) -> None:
        self._send_to(self._sent % self._num_loaders, (self._sent % self._num_slots, job))
        self._sent += 1

    def _send_to(self, loader: int, message: Any) -> None:
        with self._death_explained():
            self._connections[loader].send(message)

    def _receive(self) -> Any:
        with self._death_explained():
            result = self._connections[self._received % self._num_loaders].recv()
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
