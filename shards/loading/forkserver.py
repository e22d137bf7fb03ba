"""The process that forks decoding processes, and what those do.

    pool ── sockets ──▶ [host] ──fork──▶ decoding process: receives jobs, fills slots, answers

Started as `python -m shards.loading.forkserver`, once per process that loads data. It imports torch and the decoders
before the first fork, so decoding processes start in milliseconds and share that memory; they have one thread each.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
MAX_SOCKETS = 250  # that one message can carry
_hosts: dict[int, tuple[socket.socket, subprocess.Popen]] = {}  # of this process; a forked one has none


def start() -> socket.socket:
    """The control socket of this process's host, which is started when there is none."""
    control, host = _hosts.get(os.getpid(), (None, None))
    if host is None or host.poll() is not None:
        control, theirs = socket.socketpair()
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "shards.loading.forkserver", str(theirs.fileno())]
        host = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        _hosts[os.getpid()] = control, host
    return control


def fork(memory: int, sockets: list[int]) -> None:
    """Start one decoding process per socket; all of them map the file `memory`."""
    socket.send_fds(start(), [b"f"], [memory, *sockets])


def _main(control: socket.socket) -> None:
    import shards.loading.pk_loader
    import shards.loading.sequential  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides when to stop
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, MAX_SOCKETS)
        if not message:
            return
        memory, *sockets = descriptors
        for own in sockets:
            if not os.fork():
                control.close()
                for other in sockets:
                    if other != own:
                        os.close(other)
                _serve(Connection(own), memory)
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _reap(*_) -> None:
    with contextlib.suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            if code := os.waitstatus_to_exitcode(child[1]):
                print(f"decoding process {child[0]} ended with exit code {code}", file=sys.stderr, flush=True)


def _serve(connection: Connection, descriptor: int) -> None:
    from shards.loading.decode_pool import shared_memory

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    memory = shared_memory(descriptor)
    fill = None
    with contextlib.suppress(EOFError, ConnectionError):
        environment, pickled, slot_bytes = connection.recv()
        os.environ.update(environment | ENVIRONMENT)  # credentials may have changed since the host was started
        while True:
            slot, job = connection.recv()
            try:
                fill = fill or pickle.loads(pickled)
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
    _main(socket.socket(fileno=int(sys.argv[1])))
