"""What ends a run before its time: signals, a file in the run folder, a notice that a worker's node is to be drained.

    SIGTERM, Ctrl-C, RUN/stop-request, Ray's drain notices ──▶ [interrupts] ──▶ the loop, which asks once a step

A signal or a file is seen by one rank before the others. So each rank says what is pending as far as it knows, the
loop's all-reduce makes one answer of that, and on this answer all ranks act alike, after the same step.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from cluster.errors import Drained, Preempted
from cluster.run.storage import Storage

STOP = "stop-request"
STOP_POLL_S = {True: 1.0, False: 5.0}
"""On a local disk; elsewhere, where a look takes as long as a training step."""
DRAIN_POLL_S = 5.0


class StopSignals:
    """SIGTERM and the first Ctrl-C as requests to stop; the second Ctrl-C ends the process at once.

    While no step can be lost there is nothing to save first, so Ctrl-C is then what it is to any program. There is one
    of these in a process, as there is one handler of a signal.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        """The last signal that came."""
        self.waits = False
        """Whether something has to be saved before this process may end."""
        self._on_request: Callable[[], None] = lambda: None
        self._says = False

    def take(self, on_request: Callable[[], None] = lambda: None, *, says: bool = True) -> None:
        """Handle the signals from now on, where this is the main thread: Ray runs workers in another, and its driver
        asks them by file. says: a Ctrl-C is answered on the terminal, which one of torchrun's processes is to do."""
        self.asked, self.waits, self._on_request, self._says = None, False, on_request, says
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGINT, self._on_signal)

    @contextmanager
    def saving_first(self) -> Iterator[None]:
        """While the block runs, Ctrl-C waits until what was done is saved."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    @property
    def exit_code(self) -> int:
        """Of a process that stopped as it was asked to: 130 after Ctrl-C, else 143."""
        return 128 + (self.asked or signal.SIGTERM)

    def _on_signal(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and (self.asked == signal.SIGINT or not self.waits):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)
        if number == signal.SIGINT and self._says:
            print(
                "stopping after a checkpoint: repeat the command to go on; Ctrl-C again stops at once",
                file=sys.stderr,
                flush=True,
            )
        self._on_request()


stop_signals = StopSignals()


class Pending(NamedTuple):
    """What one rank knows of, or any of them."""

    stop: bool
    """A stop was asked for."""
    drain_poll: bool
    """It is time for all ranks to ask Ray for a drain notice: together, as its answer is a broadcast."""


class Interrupts:
    """This rank's view of them."""

    def __init__(self, run: Storage, *, is_first: bool = True, under_ray: bool = False):
        """is_first: this is the rank that looks for the file, and under Ray says when to ask for a drain notice."""
        self.run = run
        self.is_first, self.under_ray = is_first, under_ray
        self._stop = False
        self._next_stop_poll_s = self._next_drain_poll_s = 0.0
        if not under_ray:
            stop_signals.take(self._on_signal, says=is_first)

    def _on_signal(self) -> None:
        self._stop = True

    def pending(self) -> Pending:
        """This rank's answer to the loop's question after a step. No other rank is waited for."""
        now_s = time.monotonic()
        if self.is_first and not self._stop and now_s > self._next_stop_poll_s:
            self._next_stop_poll_s = now_s + STOP_POLL_S[self.run.local_root is not None]
            self._stop = self.run.exists(STOP)
        return Pending(self._stop, self.is_first and self.under_ray and now_s > self._next_drain_poll_s)

    def confirm(self, pending: Pending) -> type[Preempted] | None:
        """The exception that has to end the run after this step, if any. All ranks call this together, with what is
        pending on any of them."""
        if pending.drain_poll and self._drain_notice():
            return Drained
        return Preempted if pending.stop else None

    def _drain_notice(self) -> bool:
        import ray.train

        self._next_drain_poll_s = time.monotonic() + DRAIN_POLL_S
        if not hasattr(ray.train, "get_preemption_info"):  # before Ray 2.58, as a warning says at the start
            return False
        return ray.train.get_preemption_info() is not None


def request_stop(run_dir: str) -> None:
    """Ask a run's workers, wherever they are, to save a checkpoint at the next step and stop."""
    Storage(run_dir).write(STOP, str(os.getpid()).encode())


def withdraw_stop(run_dir: str) -> None:
    Storage(run_dir).remove(STOP)
