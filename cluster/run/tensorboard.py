"""Figures for TensorBoard, one folder of events for each of stage1, stage2 and eval.

    run_folder.py ── "stage2/loss", value, step ──▶ [events] ──▶ run.dir/tensorboard/stage2/

A run that goes on from a checkpoint shows each step once.
"""

import logging
from collections.abc import Callable
from typing import Any

from cluster.run.manifest import Position

log = logging.getLogger(__name__)


class Events:
    """Whoever looks at the curves misses something where they cannot be written; the run does not."""

    def __init__(self, url: str, position: Position | None):
        self.url = url
        self.position = position
        """From where the run goes on: what earlier starts wrote beyond it is no longer shown."""
        self._writers: dict[str, Any] = {}
        self._works = True

    def add(self, name: str, value: float, step: int) -> None:
        """`name` is GROUP/NAME; steps of stages and epochs of evaluations count from 1."""
        if self._works:
            self._try(lambda: self._writer(name.split("/")[0]).add_scalar(name, value, step))

    def close(self) -> None:
        for writer in self._writers.values():
            self._try(writer.close)

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # Each kind of storage has errors of its own.
            if self._works:
                log.warning("%s cannot be written (%s): the run goes on without events", self.url, error)
            self._works = False

    def _writer(self, group: str) -> Any:
        if group not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[group] = SummaryWriter(
                f"{self.url}/{group}", flush_secs=10, purge_step=first_new_step(group, self.position)
            )
        return self._writers[group]


def first_new_step(group: str, position: Position | None) -> int:
    """The first step of a group that a run going on from `position` has not done."""
    if position is None:
        return 1
    if group == "eval":
        return position.epoch + position.epoch_done if position.stage == 2 else 1
    stage = int(group.removeprefix("stage"))
    return position.step + 1 if stage == position.stage else 1
