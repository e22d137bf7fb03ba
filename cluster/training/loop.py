"""The training loop, the same for both stages: batch, losses, finite?, backward, step, log, checkpoint.

    stage (stage1.py, stage2.py) ──▶ [loop] ──▶ log, checkpoints

One small all-reduce a step carries the loss parts and what each rank asks for (a checkpoint by the clock, a stop, the
end after a failed write), so that all ranks log, save and stop at the same step.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cluster.errors import Preempted, TrainingError
from cluster.ranks.team import PATIENCE, Team
from cluster.run.interrupts import Interrupts, Pending
from cluster.run.manifest import Position
from cluster.run.reporter import Reporter, headline
from cluster.training.checkpoint_writer import CheckpointWriter, Due
from cluster.training.engine import Engine


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    number: int
    epochs: int
    engine: Engine
    global_images: int
    """Images in one full batch over all ranks (the last one of a stage 1 epoch may hold fewer)."""

    def lr(self, epoch: int) -> float: ...
    def num_steps(self, epoch: int) -> int: ...
    def batches(self, epoch: int, first_step: int) -> Iterator[Any]: ...
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Scalars whose means over ranks are the global batch's; "loss" is the one that trains."""

    def identities(self, batch: Any) -> list[str]:
        """This rank's identities in the batch, for messages."""


class Requests(NamedTuple):
    """What a rank asks for at a step, or any of them."""

    save: bool
    """A checkpoint, by the clock."""
    stop: bool
    drain_poll: bool
    """As in `Pending`."""
    failed: bool
    """A write in the background has failed: the run has to end."""


@dataclass
class Loop:
    """Takes a stage through its epochs, with what every stage of a run shares."""

    team: Team
    writer: CheckpointWriter
    due: Due
    reporter: Reporter
    interrupts: Interrupts
    evaluate: Callable[[int], dict[str, Any]] | None = None
    """Called by every rank at the end of an epoch that `evaluates` names: its metrics."""
    evaluates: Callable[[int], bool] = lambda epoch: False

    def run(self, stage: Stage, start: Position) -> None:
        """Train from `start` (what is done already) to the stage's last epoch.

        Raises:
            Preempted: a stop was asked for; the checkpoint is complete.
            TrainingError: a loss is not finite, or a checkpoint could not be written.
        """
        epoch_step, step = (0 if start.epoch_done else start.epoch_step), start.step
        for epoch in range(start.epoch + start.epoch_done, stage.epochs + 1):
            stage.engine.set_lr(stage.lr(epoch))
            num_steps = stage.num_steps(epoch)
            # Patiently: ranks come from very different work.
            self.team.barrier(f"begin stage {stage.number}, epoch {epoch}")
            throughput = _Throughput(stage.global_images)
            for batch in stage.batches(epoch, epoch_step + 1):
                epoch_step, step = epoch_step + 1, step + 1
                here = Position(stage.number, epoch, epoch_step, step, False)
                entry, asked, interrupt = self._train_step(stage, batch, here)
                entry["images_per_s"] = round(throughput.after_a_step(), 2)
                steps_left = num_steps - epoch_step + num_steps * (stage.epochs - epoch)
                self.reporter.step(entry, steps_left=steps_left, epochs=stage.epochs)
                self.due.after_step(step, asked=asked)
                if interrupt or (self.due.owed and epoch_step < num_steps):  # The epoch's end pays what is owed then.
                    self._save(stage, here)
                if interrupt:
                    self.writer.finish()
                    raise interrupt(f"stopped after {here.words}, with a checkpoint; the same command goes on from it")
            self._end_epoch(stage, Position(stage.number, epoch, epoch_step, step, True))
            epoch_step = 0
        self.writer.finish()

    def _train_step(
        self, stage: Stage, batch: Any, here: Position
    ) -> tuple[dict[str, Any], bool, type[Preempted] | None]:
        """One optimizer step: the log entry, whether the clock asks for a checkpoint, and what interrupts the run, if
        anything does."""
        patience = PATIENCE if here.epoch_step == 1 else 1.0  # Compiling and warming up come with a first step.
        with self.team.within(f"train stage {here.stage}, epoch {here.epoch}, step {here.step}", patience):
            stage.engine.remember_buffers()
            losses = stage.losses(batch)
            by_clock = self.team.is_first and self.due.by_clock()
            own = Requests(by_clock, *self.interrupts.pending(), failed=self.writer.failed)
            reduction = StepReduction(self.team, losses, own)
            stage.engine.backward(losses["loss"])
            # On its way since before the backward pass, which hides it; and waiting for it leaves the GPU busy.
            means, requests = reduction.wait()
            self._check_finite(means, stage, batch, here)
            self.writer.before_update()
            stage.engine.step()
            if requests.failed:
                self.writer.finish()
            interrupt = self.interrupts.confirm(Pending(requests.stop, requests.drain_poll))
        entry = {"stage": here.stage, "epoch": here.epoch, "step": here.step, **means, "lr": stage.lr(here.epoch)}
        return entry, requests.save, interrupt

    def _check_finite(self, means: dict[str, float], stage: Stage, batch: Any, here: Position) -> None:
        """Stop before a loss that is not finite moves a parameter; the state before the step is saved first."""
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if not bad:
            return
        by_rank = self.team.all_gather_objects(stage.identities(batch), "name identities")
        identities = sorted({identity for own in by_rank for identity in own})
        stage.engine.restore_buffers()
        # A finite loss can have a gradient that is not; then the step before this one has spoilt the parameters.
        sound = bool(all(self.team.all_gather_objects(stage.engine.is_finite(), "look at the parameters")))
        outcome = "the state before this step is saved"
        try:
            if sound:
                before = here._replace(epoch_step=here.epoch_step - 1, step=here.step - 1)
                self.writer.save(before, stage.engine)
            else:
                outcome = "the step before left parameters that are not finite"
            self.writer.finish()
        except TrainingError as error:
            outcome = str(error)
        self.team.barrier("save the state before the step")
        raise TrainingError(
            f"{here.words}: {', '.join(bad)} is not finite "
            f"({', '.join(f'{n} {means[n]}' for n in bad)}); identities of the batch: {', '.join(identities)}; "
            f"{outcome}; a smaller learning rate or train.precision=float32 may help, "
            "and `launch/pack.py verify` tells whether the images are sound"
        )

    def _end_epoch(self, stage: Stage, done: Position) -> None:
        self.due.after_epoch(done.epoch, is_last=done.epoch == stage.epochs)
        metrics = None
        if self.evaluate and self.evaluates(done.epoch):
            if self.due.owed:  # First: a kill in the evaluation must not cost the steps.
                self._save(stage, done._replace(epoch_done=False))
            metrics = self.evaluate(done.epoch)
        self.reporter.epoch(done.stage, done.epoch, metrics)
        if metrics or self.due.owed:
            self._save(stage, done, mAP=headline(metrics)["mAP"] if metrics else None)

    def _save(self, stage: Stage, position: Position, mAP: float | None = None) -> None:
        # First, so that no checkpoint is further than the log.
        self.team.on_first(self.reporter.flush, "write the log")
        self.writer.save(position, stage.engine, mAP=mAP)
        self.due.saved()
        self.reporter.saved(position.words)


class StepReduction:
    """Loss parts averaged over ranks, and what any rank asks for, on their way from the device to the host."""

    def __init__(self, team: Team, losses: dict[str, Tensor], own: Requests):
        self._names = list(losses)
        parts = torch.stack([losses[n].detach().to(torch.float64) for n in self._names]) / team.world_size
        # From ordinary memory the copy might wait for the work queued before.
        asked = torch.tensor(own, dtype=parts.dtype, pin_memory=parts.is_cuda).to(parts.device, non_blocking=True)
        total, arrived = team.start_all_reduce_sum(torch.cat([parts, asked]))
        self._values, self._wait = total, arrived
        if total.device.type == "cuda":
            arrived()
            self._values = torch.empty(total.shape, dtype=total.dtype, pin_memory=True)
            self._values.copy_(total, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._wait = copied.synchronize

    def wait(self) -> tuple[dict[str, float], Requests]:
        self._wait()
        values = self._values.tolist()
        means = dict(zip(self._names, values, strict=False))
        return means, Requests(*(count > 0 for count in values[len(means) :]))


class _Throughput:
    """Images per second over the last steps of this epoch."""

    WINDOW = 20

    def __init__(self, images_per_step: int):
        self.images_per_step = images_per_step
        self.times_s = [time.perf_counter()]

    def after_a_step(self) -> float:
        self.times_s = [*self.times_s[-self.WINDOW :], time.perf_counter()]
        return self.images_per_step * (len(self.times_s) - 1) / (self.times_s[-1] - self.times_s[0])
