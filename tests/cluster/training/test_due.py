"""What is due is written, wherever it falls: the loop over every mixture of reasons for a checkpoint, without files."""

from functools import partial
from itertools import product

import pytest
import torch

from cluster.ranks.team import Team
from cluster.run.manifest import FOLDER, Position, read_manifests
from cluster.run.reporter import SilentReporter
from cluster.run.storage import Storage
from cluster.training.checkpoint_writer import Due
from cluster.training.loop import Loop
from tests.helpers.checkpoints import NoInterrupts, at, loaded, plain_engine, save, writer_at

STEP_S = 20.0
METRICS = dict.fromkeys(("mAP", "R1", "R5", "R10"), 0.5)
EVERY = [
    (steps, minutes, epochs)
    for steps, minutes, epochs in product((0, 1, 2, 3, 5, 7), (0, 0.1, 1, 2.5), (0, 1, 2, 3))
    if steps or minutes or epochs
]


class Stage:
    """Epochs of the same number of steps; `step` is called before each."""

    number, global_images = 2, 4

    def __init__(self, epochs, epoch_steps, step):
        self.epochs, self.epoch_steps, self.step = epochs, epoch_steps, step
        self.engine = plain_engine(1.0)
        for name in ("set_lr", "remember_buffers", "restore_buffers", "backward", "step"):
            setattr(self.engine, name, lambda *_: None)

    def lr(self, epoch):
        return 1.0

    def num_steps(self, epoch):
        return self.epoch_steps

    def batches(self, epoch, first_step):
        yield from range(first_step, self.epoch_steps + 1)

    def losses(self, batch):
        self.step()
        return {"loss": torch.zeros(())}

    def identities(self, batch):
        return []


class Saves:
    """Stands where the writer would: what it is given is complete at once."""

    failed = False

    def __init__(self):
        self.positions = []

    def before_update(self):
        pass

    def save(self, position, engine, *, mAP=None):
        self.positions.append(position)

    def finish(self):
        pass


class Life:
    """The loop from a position to its end, by a clock of its own; `check(life)` is called wherever it could be killed
    and would have done something since."""

    def __init__(self, every, epochs, epoch_steps, evaluated, start, check=lambda life: None):
        self.check, self.now_s, self.done, self.evaluated = check, 0.0, start.step, []
        self.saves = Saves()
        stage, due = Stage(epochs, epoch_steps, self.step), Due(*every, clock=lambda: self.now_s)
        reporter, evaluates = SilentReporter(), lambda epoch: epoch in evaluated
        Loop(Team(), self.saves, due, reporter, NoInterrupts(), self.evaluate, evaluates).run(stage, start)
        self.check(self)

    def step(self):
        self.check(self)
        self.done += 1
        self.now_s += STEP_S

    def evaluate(self, epoch):
        self.check(self)
        self.now_s += 3 * STEP_S
        self.evaluated.append(epoch)
        return METRICS


def check_nothing_due_is_missing(life, every, epoch_steps):
    steps, minutes, epochs = every
    saved = life.saves.positions[-1].step if life.saves.positions else 0
    for interval in (steps, epochs * epoch_steps):
        assert not interval or saved >= life.done - life.done % interval, (every, life.done, saved)
    late_s = (life.done - saved) * STEP_S
    assert not minutes or late_s <= minutes * 60 + 2 * STEP_S, (every, life.done, saved)


@pytest.mark.parametrize("epoch_steps", [1, 2, 5])
@pytest.mark.parametrize("evaluated", [[], [2, 3]])
def test_a_kill_at_any_moment_costs_no_step_before_the_last_due_checkpoint(epoch_steps, evaluated):
    epochs = 20 // epoch_steps
    for every in EVERY:
        check = partial(check_nothing_due_is_missing, every=every, epoch_steps=epoch_steps)
        life = Life(every, epochs, epoch_steps, evaluated, Position(2, 1, 0, 0, False), check)
        assert life.saves.positions[-1] == Position(2, epochs, epoch_steps, 20, True)
        assert life.evaluated == evaluated


@pytest.mark.parametrize("epoch_steps", [1, 2, 5])
def test_from_every_checkpoint_the_rest_is_done_once(epoch_steps):
    epochs, evaluated = 20 // epoch_steps, [2, 3]
    every_step = Life((1, 0, 1), epochs, epoch_steps, evaluated, Position(2, 1, 0, 0, False)).saves.positions
    assert {position.step for position in every_step} == set(range(1, 21))
    for start in every_step:
        again = Life((3, 0, 0), epochs, epoch_steps, evaluated, start)
        assert again.done == 20
        assert again.evaluated == [e for e in evaluated if (e, True) > (start.epoch, start.epoch_done)], start


def test_metrics_join_the_checkpoint_that_was_written_before_they_were_known(tmp_path):
    """Its state is not written again."""
    writer = writer_at(tmp_path)
    save(writer, 7)
    (weights,) = (tmp_path / FOLDER).glob("*/*.safetensors")
    before = weights.stat()
    for again in (writer, writer_at(tmp_path)):
        again.save(at(7)._replace(epoch_done=True), plain_engine(7.0), mAP=0.5)
        again.finish()
        (manifest,) = read_manifests(Storage(str(tmp_path)))[0]
        assert manifest.position.epoch_done and manifest.mAP == 0.5
        assert weights.stat().st_mtime_ns == before.st_mtime_ns and loaded(tmp_path) == (7, 7.0)
