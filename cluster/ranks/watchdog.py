"""Turning a hang into a failure that names the missing ranks and the operation.

    every rank ── heartbeat: its operation, since when ──▶ store of the process group ──▶ [watchdog] ──▶ error

A collective that gloo gives up, or that NCCL would wait for without end (a lost node, a network partition), fails here
with the ranks that did not arrive and the operation. The process then ends, and Ray Train starts the workers again.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from cluster.errors import RankLost

log = logging.getLogger(__name__)
BEAT_S = 2.0
"""Seconds from one heartbeat to the next."""
GRACE_S = 15.0
"""Seconds that a collective's own timeout has to fire first: its error says more."""
STORE_S = 5.0
"""Seconds to wait for the store's answer."""
EXIT_CODE = 70


@dataclass
class Beat:
    """A rank's last heartbeat."""

    operation: str
    count: int
    """Number of operations that it has begun."""
    at_s: float
    """Wall clock of the heartbeat, seconds."""


class Watchdog:
    """Publishes this rank's heartbeat, and ends the process where a collective lasts longer than it may."""

    def __init__(self, rank: int, world_size: int, timeout_s: float):
        """world_size: at least 2; the process group exists."""
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._now = ("start", 0, time.monotonic(), float("inf"))
        self._stop = threading.Event()
        self._store = _own_store()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._publish, self._watch)]
        for thread in self.threads:
            thread.start()

    @contextmanager
    def during(self, operation: str, patience: float = 1.0) -> Iterator[None]:
        """The block needs all ranks and may last `patience` x timeout_s; what is outside of blocks is not timed."""
        before = self._now
        self._now = (operation, before[1] + 1, time.monotonic(), patience * self.timeout_s)
        try:
            yield
        finally:
            nested = before[3] < float("inf")
            self._now = (before[0] if nested else f"own work after {operation}", self._now[1], *before[2:])

    def close(self) -> None:
        self._stop.set()
        for thread in self.threads:
            thread.join(timeout=2 * BEAT_S)

    def explain(self, error: BaseException) -> RankLost:
        """A failed collective in words: the operation, and who did not come to it."""
        operation, count, since, _ = self._now
        waited = time.monotonic() - since
        return RankLost(self.rank, operation, waited, self._absent(count), str(error).split("\n")[0])

    def _watch(self) -> None:
        heard: dict[int, tuple[Beat | None, float]] = {}
        while not self._stop.wait(BEAT_S):
            _, _, since, limit_s = self._now
            waited = time.monotonic() - since
            if limit_s == float("inf") or waited < self.timeout_s / 2:
                heard = {}
                continue
            # Patience is for ranks that are busy, not for those that are gone.
            silent_s = self._silence(heard)
            if waited > limit_s + GRACE_S or (waited > self.timeout_s and silent_s > self._may_be_silent_s):
                log.error("%s", self.explain(TimeoutError("no answer")))
                logging.shutdown()
                os._exit(EXIT_CODE)  # The main thread is inside the collective and cannot be reached.

    @property
    def _may_be_silent_s(self) -> float:
        return max(self.timeout_s / 2, 5 * BEAT_S)

    def _silence(self, heard: dict[int, tuple[Beat | None, float]]) -> float:
        """Seconds by this rank's clock since the last heartbeat of the rank that is silent for the longest.

        heard: each rank's last new heartbeat, and when this rank saw it.
        """
        now = time.monotonic()
        beats: dict[int, Beat | None] = {}
        reader = threading.Thread(target=self._read_beats, args=(beats,), daemon=True)
        reader.start()
        reader.join(timeout=STORE_S)
        for rank in set(range(self.world_size)) - {self.rank}:
            if rank not in heard or (rank in beats and beats[rank] != heard[rank][0]):
                heard[rank] = beats.get(rank), now
        return max(now - at_s for _, at_s in heard.values())

    def _publish(self) -> None:
        """In a thread of its own: behind a network partition the store never answers."""
        while True:
            operation, count, *_ = self._now
            beat = {"operation": operation, "count": count, "at_s": time.time()}
            try:
                self._store.set(f"beat/{self.rank}", json.dumps(beat))
            except RuntimeError:  # The store lives on rank 0's node. Its loss shows in the collective, which names it.
                return
            if self._stop.wait(BEAT_S):
                return

    def _absent(self, count: int) -> dict[int, str]:
        """Who did not come, and what they last did, as far as the store on rank 0's node says so in time."""
        beats: dict[int, Beat | None] = {}
        reader = threading.Thread(target=self._read_beats, args=(beats,), daemon=True)
        reader.start()
        reader.join(timeout=STORE_S)
        if reader.is_alive():
            return {0: f"no answer from its node for {STORE_S:g} s"}
        if len(beats) < self.world_size:
            return {0: "its process, which keeps the heartbeats, is gone"}
        return self._missing(beats, count)

    def _read_beats(self, beats: dict[int, Beat | None]) -> None:
        try:
            for rank in range(self.world_size):
                known = self._store.check([f"beat/{rank}"])
                beats[rank] = Beat(**json.loads(self._store.get(f"beat/{rank}"))) if known else None
        except RuntimeError:
            return

    def _missing(self, beats: dict[int, Beat | None], count: int) -> dict[int, str]:
        """Ranks that are silent, or have begun fewer operations than this one, with what they last did."""
        now, missing = time.time(), {}
        for rank, beat in beats.items():
            if rank == self.rank:
                continue
            if beat is None:
                missing[rank] = "never heard of"
            elif now - beat.at_s > 5 * BEAT_S:
                missing[rank] = f"silent for {now - beat.at_s:.0f} s, last in '{beat.operation}'"
            elif beat.count < count:
                missing[rank] = f"still in '{beat.operation}'"
        return missing


def _own_store() -> Any:
    """A connection of our own to the group's key-value store, since the main thread may block in its one."""
    return dist.distributed_c10d._get_default_store().clone()
