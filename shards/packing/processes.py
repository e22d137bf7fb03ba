"""Tasks over processes: what pack and verify share.

    tasks ──▶ [run_tasks] ──▶ results, as they are done

Processes die with the process that started them, even when that one is killed.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from shards import storage
from shards.errors import DataError
from shards.progress import Progress

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Called by a task with the number of images it has done since the last call."""

POLL_S = 0.2
FEW_IMAGES = 2000
"""Done by one process in about the time that a second one needs to start."""
_shared: Any = None  # in a started process: (images done by all, whether to stop)


class _Stopped(Exception):
    """The parent has given up; the task ends without a result."""


def choose_processes(asked: int | None, images: int, urls: Iterable[str]) -> int:
    """As asked; else the cores this process may use, or 1 where starting others takes longer than the work.

    Always 1 when another process would not see the files at `urls`.
    """
    if any(storage.is_process_local(url) for url in urls) or (not asked and images < FEW_IMAGES):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or cores


def run_tasks(
    function: Callable[[Task, Advance], Result],
    tasks: Sequence[Task],
    processes: int,
    progress: Progress,
    total: int,
) -> Iterator[Result]:
    """Yield function(task, advance) for every task, in the order they end. total: images of all tasks.

    With one process or one task everything runs here. An exception in a task ends the rest and is raised.
    """
    processes = min(processes, len(tasks))
    if processes <= 1:
        done = 0

        def advance(images: int) -> None:
            nonlocal done
            done += images
            progress(done, total)

        for task in tasks:
            yield function(task, advance)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy threads and locks of fsspec's loop
    counter, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(processes, context, _enter, (counter, stop)) as pool:
        pending = {pool.submit(_run_task, function, task) for task in tasks}
        try:
            while pending:
                done_now, pending = wait(pending, POLL_S, FIRST_COMPLETED)
                progress(counter.value, total)
                for future in done_now:
                    yield _result(future)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _result(future: Future) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process was killed (out of memory?): repeat the command with fewer --processes; finished shards are kept"
        ) from error


def _enter(counter: Any, stop: Any) -> None:
    global _shared
    _shared = (counter, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which sets `stop`
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run_task(function: Callable[[Task, Advance], Result], task: Task) -> Result:
    counter, stop = _shared

    def advance(images: int) -> None:
        with counter.get_lock():
            counter.value += images
        if stop.is_set():
            raise _Stopped

    return function(task, advance)
