"""The training loop, the same for both stages: batch, losses, finite?, backward, step, log, checkpoint.

    stage (stage1.py, stage2.py) ──▶ [loop] ──▶ log, checkpoints
                                       ▲
                    SIGTERM, the clock ┘

One small all-reduce a step carries the loss parts and the wishes of the ranks (a checkpoint by the clock, a stop,
a failed write), so that all ranks log, save and stop at the same step.
"""

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cluster.errors import Drained, Preempted, TrainingError
from cluster.ranks.team import PATIENCE, Team
from cluster.run.manifest import Position
from cluster.training.checkpoint import Checkpoints, Due
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


class Reporter(Protocol):
    """Where the loop's news go; rank 0 has a run folder behind it, the others nothing."""

    def step(self, entry: dict[str, Any], *, steps_left: int, epochs: int) -> None: ...
    def flush(self) -> None: ...
    def saved(self, name: str) -> None: ...
    def epoch(self, stage: int, epoch: int) -> float | None:
        """Called by every rank at the end of an epoch, before its checkpoint; mAP, where it was evaluated."""

    def should_stop(self) -> bool: ...
    def wants_drain_notice(self) -> bool:
        """Whether it is time for all ranks to ask for one."""

    def drain_notice(self) -> bool:
        """Called by every rank together: is a worker's node about to be taken away?"""


def run_stage(
    stage: Stage,
    team: Team,
    checkpoints: Checkpoints,
    reporter: Reporter,
    due: Due,
    start: Position,
    every_epochs: int,
) -> None:
    """Train from `start` (what is done already) to the stage's last epoch.

    Raises:
        Preempted: a stop was asked for; the checkpoint is complete.
        TrainingError: a loss is not finite, or a checkpoint could not be written.
    """
    epoch_step, step = (0 if start.epoch_done else start.epoch_step), start.step
    for epoch in range(start.epoch + start.epoch_done, stage.epochs + 1):
        stage.engine.set_lr(stage.lr(epoch))
        num_steps = stage.num_steps(epoch)
        team.barrier(f"begin stage {stage.number}, epoch {epoch}")  # Patiently: ranks come from very different work.
        meter = _Meter()
        for batch in stage.batches(epoch, epoch_step + 1):
            here = Position(stage.number, epoch, epoch_step + 1, step + 1, False)
            entry, wanted = _train_step(stage, team, checkpoints, reporter, due, batch, here)
            epoch_step, step = here.epoch_step, here.step
            entry["images_per_s"] = round(meter.rate(stage.global_images), 2)
            reporter.step(
                entry, steps_left=num_steps - epoch_step + num_steps * (stage.epochs - epoch), epochs=stage.epochs
            )
            if wanted.stop or (wanted.save and epoch_step < num_steps):  # After a stop the next start ends the epoch.
                _save(checkpoints, stage, reporter, due, here, None)
            if wanted.stop:
                checkpoints.finish()
                kind = Drained if wanted.drain else Preempted
                raise kind(f"stopped after {here.words}")
        mAP = reporter.epoch(stage.number, epoch)
        if mAP is not None or epoch == stage.epochs or (every_epochs and epoch % every_epochs == 0):
            _save(checkpoints, stage, reporter, due, Position(stage.number, epoch, epoch_step, step, True), mAP)
        epoch_step = 0
    checkpoints.finish()


def _train_step(
    stage: Stage, team: Team, checkpoints: Checkpoints, reporter: Reporter, due: Due, batch: Any, here: Position
) -> tuple[dict[str, Any], "_Wanted"]:
    """One optimizer step. The log entry, and what any rank wants after it."""
    patience = PATIENCE if here.epoch_step == 1 else 1.0  # Compiling and warming up come with a first step.
    with team.within(f"train stage {here.stage}, epoch {here.epoch}, step {here.step}", patience):
        stage.engine.remember_buffers()
        losses = stage.losses(batch)
        wishes = (
            team.is_first and due.by_clock(), reporter.should_stop(), reporter.wants_drain_notice(), checkpoints.failed
        )  # fmt: skip
        news = _NewsOfStep(team, losses, wishes)
        stage.engine.backward(losses["loss"])
        # The news was on its way before the backward pass was queued: waiting for it leaves the GPU busy.
        means, (save, stop, ask, failed) = news.arrived()
        _check_finite(means, stage, team, checkpoints, batch, here)
        stage.engine.step()
        if failed:
            checkpoints.finish()
        drain = ask and reporter.drain_notice()
    entry = {"stage": here.stage, "epoch": here.epoch, "step": here.step, **means, "lr": stage.lr(here.epoch)}
    stop = stop or drain
    return entry, _Wanted(due.by_steps(here.step) or save or stop, stop, drain)


class _Wanted(NamedTuple):
    """What is to be done after a step, the same on every rank."""

    save: bool
    stop: bool
    drain: bool


class _NewsOfStep:
    """Loss parts averaged over ranks and the ranks' wishes, on their way from the device to the host."""

    def __init__(self, team: Team, losses: dict[str, Tensor], wishes: tuple[bool, ...]):
        self.names = list(losses)
        parts = torch.stack([losses[n].detach().to(torch.float64) for n in self.names]) / team.world_size
        # From ordinary memory the copy might wait for the work queued before.
        asked = torch.tensor(wishes, dtype=parts.dtype, pin_memory=parts.is_cuda).to(parts.device, non_blocking=True)
        total = team.all_reduce_sum(torch.cat([parts, asked]))
        self.event = None
        self.values = total
        if total.device.type == "cuda":
            self.values = torch.empty(total.shape, dtype=total.dtype, pin_memory=True)
            self.values.copy_(total, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def arrived(self) -> tuple[dict[str, float], tuple[bool, ...]]:
        if self.event is not None:
            self.event.synchronize()
        values = self.values.tolist()
        means = dict(zip(self.names, values, strict=False))
        return means, tuple(wish > 0 for wish in values[len(means) :])


def _check_finite(
    means: dict[str, float], stage: Stage, team: Team, checkpoints: Checkpoints, batch: Any, here: Position
) -> None:
    """Stop before a loss that is not finite moves a parameter; the state before the step is saved first."""
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if not bad:
        return
    names = sorted({i for part in team.all_gather_objects(stage.identities(batch), "name identities") for i in part})
    stage.engine.restore_buffers()
    # A finite loss can have a gradient that is not; then the step before this one has spoilt the parameters.
    sound = all(bool(parameter.isfinite().all()) for parameter in stage.engine.module.parameters())
    outcome = "the state before this step is saved" if sound else "the step before left parameters that are not finite"
    try:
        if sound:
            checkpoints.save(here._replace(epoch_step=here.epoch_step - 1, step=here.step - 1), stage.engine)
        checkpoints.finish()
    except TrainingError as error:
        outcome = str(error)
    team.barrier("save the state before the step")
    raise TrainingError(
        f"{here.words}: {', '.join(bad)} is not finite "
        f"({', '.join(f'{n} {means[n]}' for n in bad)}); identities of the batch: {', '.join(names)}; "
        f"{outcome}; a smaller learning rate or train.precision=float32 may help, "
        "and `launch/pack.py verify` tells whether the images are sound"
    )


def _save(
    checkpoints: Checkpoints,
    stage: Stage,
    reporter: Reporter,
    due: Due,
    position: Position,
    mAP: float | None,
) -> None:
    reporter.flush()  # First, so that no checkpoint is further than the log.
    checkpoints.save(position, stage.engine, mAP=mAP)
    due.saved()
    reporter.saved(position.words)


class _Meter:
    """Images per second over the last steps of this epoch."""

    WINDOW = 20

    def __init__(self):
        self.times = [time.perf_counter()]

    def rate(self, images: int) -> float:
        self.times = [*self.times[-self.WINDOW :], time.perf_counter()]
        return images * (len(self.times) - 1) / (self.times[-1] - self.times[0])
