"""Ranks simulated in one process: a thread each, in step, with a gather that waits for all of them.

All ranks are in one autograd graph, so the gather's backward sums over them, as `clipreid.gather` demands.
"""

import threading

import torch


def run_ranks(world_size, function):
    """The results of function(rank, gather) on every rank; backward is left to the caller."""
    parts, results, errors = [None] * world_size, [None] * world_size, []
    barrier = threading.Barrier(world_size, timeout=20)

    def run(rank):
        def gather(part):
            parts[rank] = part
            barrier.wait()
            whole = torch.cat(parts)
            barrier.wait()
            return whole

        try:
            results[rank] = function(rank, gather)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
