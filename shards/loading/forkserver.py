"""The process that forks decoding processes, and what those do.

    decode pool ── sockets ──▶ [forkserver] ──fork──▶ decoding process: receives jobs, fills slots, answers

Started as `python -m shards.loading.forkserver`, once per process that loads data. It imports the modules that its
caller names before it forks, so decoding processes start in milliseconds and share that memory. Each has one thread.
"""

import contextlib
import importlib
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
MAX_SOCKETS = 250  # that one message can carry


class _Server(NamedTuple):
    """The caller's side of a running server."""

    process: subprocess.Popen
    orders: Connection
    """Carries names of modules to import, or None: a fork follows on `descriptors`."""
    descriptors: socket.socket


_servers: dict[int, _Server] = {}  # of this process, by its id; a forked one has none


def start(preload: str) -> None:
    """Start this process's server when there is none, and have it import a module; returns at once."""
    _server().orders.send(preload)


def fork(memory: int, sockets: list[int]) -> None:
    """Start one decoding process per socket; all of them map the file `memory`."""
    server = _server()
    server.orders.send(None)
    socket.send_fds(server.descriptors, [b"f"], [memory, *sockets])


def shared_memory(descriptor: int) -> np.ndarray:
    """uint8, the whole file, shared with every process that maps it."""
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)


def _server() -> _Server:
    server = _servers.get(os.getpid())
    if server is None or server.process.poll() is not None:
        (orders, their_orders), (descriptors, their_descriptors) = socket.socketpair(), socket.socketpair()
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        theirs = [their_orders.fileno(), their_descriptors.fileno()]
        command = [sys.executable, "-m", "shards.loading.forkserver", *map(str, theirs)]
        process = subprocess.Popen(command, pass_fds=theirs, env=environment, stdin=subprocess.DEVNULL)
        their_orders.close()
        their_descriptors.close()
        server = _servers[os.getpid()] = _Server(process, Connection(orders.detach()), descriptors)
    return server


def _main(orders: Connection, descriptors: socket.socket) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides when to stop
    signal.signal(signal.SIGCHLD, _reap)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            if preload := orders.recv():
                importlib.import_module(preload)
                continue
            memory, *sockets = socket.recv_fds(descriptors, 1, MAX_SOCKETS)[1]
            for own in sockets:
                if not os.fork():
                    orders.close()
                    descriptors.close()
                    for other in sockets:
                        if other != own:
                            os.close(other)
                    _serve(Connection(own), memory)
                    os._exit(0)
            for descriptor in (memory, *sockets):
                os.close(descriptor)


def _reap(*_: Any) -> None:
    with contextlib.suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            if code := os.waitstatus_to_exitcode(child[1]):
                print(f"decoding process {child[0]} ended with exit code {code}", file=sys.stderr, flush=True)


def _serve(connection: Connection, descriptor: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    memory = shared_memory(descriptor)
    fill = None
    with contextlib.suppress(EOFError, ConnectionError):
        environment, pickled, slot_shape = connection.recv()
        os.environ.update(environment | ENVIRONMENT)  # credentials may have changed since the server was started
        slots = memory.reshape(-1, *slot_shape)
        while True:
            slot, job = connection.recv()
            try:
                fill = fill or pickle.loads(pickled)
                result = fill(job, slots[slot])
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
    _main(Connection(int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2])))
