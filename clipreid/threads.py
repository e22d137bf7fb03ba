"""Work shared out among threads on a CPU, with results that do not depend on how many there are."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def in_threads(
    work: Callable[..., Result], tasks: Iterable[tuple[Any, ...]], device: torch.device
) -> Generator[Result, None, None]:
    """What work(*task) gives for each task, in order; on a CPU in as many threads as torch has, each using one.

    Sums round differently with another number of threads, so each task is left to one. Grad mode is each thread's own:
    `work` has to set it. To be used up, or closed.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        for task in tasks:
            yield work(*task)
        return
    pending: deque[Future[Result]] = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for task in tasks:
                pending.append(pool.submit(work, *task))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(threads)  # The number that later threads begin with is that of the last call.
