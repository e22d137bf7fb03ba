"""Ranks simulated in one process: a thread each, in step, with collectives that wait for all of them."""

import threading
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ThreadPeers:
    """The `clipreid.peers.Peers` of one thread.

    All ranks are in one autograd graph, so the backward of a gather sums over them, as it has to.
    """

    rank: int
    world_size: int
    barrier: threading.Barrier
    posted: list[Any]
    """What each rank has brought to the collective under way."""

    def all_gather(self, tensor):
        return torch.cat(self._of_all_ranks(tensor))

    def all_to_all(self, tensor, send, receive):
        sent = self._of_all_ranks(tensor.split(list(send)))
        received = torch.cat([parts[self.rank] for parts in sent])
        assert [len(parts[self.rank]) for parts in sent] == list(receive)
        return received

    def all_reduce_max(self, tensor):
        return torch.stack(self._of_all_ranks(tensor.detach())).amax(0)

    def all_reduce_sum(self, tensor):
        return torch.stack(self._of_all_ranks(tensor.detach())).sum(0, dtype=tensor.dtype)

    def _of_all_ranks(self, tensor):
        self.posted[self.rank] = tensor
        self.barrier.wait()
        tensors = list(self.posted)
        self.barrier.wait()
        return tensors


def run_ranks(world_size, function):
    """The results of function(peers) on every rank; backward is left to the caller."""
    posted, results, errors = [None] * world_size, [None] * world_size, []
    barrier = threading.Barrier(world_size, timeout=20)

    def run(rank):
        try:
            results[rank] = function(ThreadPeers(rank, world_size, barrier, posted))
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
