"""Checkpoints: complete or not counted, damaged ones skipped by name, old ones kept or removed as asked."""

import json
import logging
import threading

import fsspec
import pytest
import torch

from cluster.errors import Preempted, TrainingError
from cluster.ranks.team import Team
from cluster.run.interrupts import Pending
from cluster.run.manifest import FOLDER, Position, read_manifests
from cluster.run.reporter import SilentReporter
from cluster.run.storage import Storage
from cluster.training.checkpoint_writer import Due
from cluster.training.engine import Engine
from cluster.training.host_copy import HostCopy
from cluster.training.loop import Loop
from cluster.training.pieces import KEYS, MOMENTS
from cluster.training.trained_table import TrainedTable
from tests.helpers.checkpoints import (
    NoInterrupts,
    Plain,
    at,
    damage,
    loaded,
    names,
    newest_at,
    plain_engine,
    save,
    writer_at,
)
from tests.helpers.object_store import s3_server
from tests.helpers.processes import on_processes
from tests.helpers.tables import table_of


def test_the_newest_comes_back_with_values_moments_buffers_and_step_count(tmp_path):
    save(writer_at(tmp_path), 3, 7)
    found, engine = newest_at(tmp_path), plain_engine(0.0)
    found.load(engine, Team())
    assert (found.position, engine.steps) == (at(7), 7)
    (weight, *_), table = engine.replicated.pieces(0), engine.tables[0].piece()
    assert [getattr(weight, key)[0].item() for key in KEYS] == [7, 8, 9]
    assert [getattr(table, key)[0].item() for key in KEYS] == [7, 0, 0]
    assert engine.module[1].running_mean.tolist() == [7, 7]


def test_a_manifest_keeps_the_keys_of_its_format_on_disk(tmp_path):
    """Checkpoints of earlier versions are read, which carry no checksum of their manifest."""
    save(writer_at(tmp_path), 7)
    (path,) = (tmp_path / FOLDER).glob("*/manifest.json")
    tree = json.loads(path.read_text())
    assert len(tree.pop("sha256")) == 64
    assert tree["position"] == {"stage": 2, "epoch": 1, "step": 7, "total": 7, "epoch_done": False}
    path.write_text(json.dumps(tree | {"position": tree["position"] | {"step": 3}}))
    assert newest_at(tmp_path).position == Position(2, 1, epoch_step=3, step=7, epoch_done=False)


def test_keep_newest_and_best_by_map(tmp_path):
    writer = writer_at(tmp_path, keep=2)
    save(writer, 1, mAP=0.9)
    save(writer, 2, mAP=0.5)
    save(writer, 3, 4)
    assert names(tmp_path) == [1, 3, 4]


def test_a_later_stage_is_newer_than_any_step_of_an_earlier_one(tmp_path):
    writer = writer_at(tmp_path)
    writer.save(at(500, stage=1), plain_engine(1.0))
    writer.save(at(2, stage=2), plain_engine(2.0))
    writer.finish()
    assert newest_at(tmp_path).position == at(2, stage=2)


@pytest.fixture(params=["memory", "s3"])
def remote(request):
    """URL of a folder in a store that is no file system."""
    if request.param == "memory":
        yield "memory://checkpoints/run"
        fsspec.filesystem("memory").store.clear()
    else:
        with s3_server("checkpoints") as bucket:
            yield f"{bucket}/run"


def test_checkpoints_in_an_object_store_are_kept_skipped_and_gone_on_from_as_on_a_disk(remote):
    save(writer_at(remote, keep=2), 3, 5, 7)
    assert names(remote) == [5, 7]
    assert loaded(remote) == (7, 7.0)
    newest = Storage(f"{remote}/{FOLDER}/{Storage(remote).names(FOLDER)[-1]}")
    content = bytearray(newest.read("rank-0-of-1.safetensors"))
    content[-5] ^= 1
    newest.write("rank-0-of-1.safetensors", bytes(content))
    again = writer_at(remote, keep=2)
    assert loaded(remote) == (5, 5.0)
    assert loaded("memory://elsewhere", newest.url.replace("00000007", "00000005")) == (5, 5.0)
    save(again, 9)
    assert names(remote) == [5, 9]


@pytest.mark.parametrize("kind", ["truncated", "flipped", "unreadable manifest", "no manifest"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_and_named(tmp_path, kind, caplog):
    save(writer_at(tmp_path), 3, 7)
    name = damage(tmp_path, kind)
    with caplog.at_level(logging.WARNING):
        assert newest_at(tmp_path).position == at(3)
    if kind in ("truncated", "flipped"):
        assert name in caplog.text
    elif kind == "unreadable manifest":
        assert "manifest.json cannot be read" in caplog.text


def test_what_an_interrupted_write_left_is_removed_by_the_next(tmp_path):
    left = tmp_path / FOLDER / "stage2-00000009-dead"
    left.mkdir(parents=True)
    (left / "rank-0-of-1.safetensors").write_bytes(b"half")
    save(writer_at(tmp_path), 3)
    assert not left.exists()


def test_a_failed_write_is_reported_and_leaves_the_one_before(tmp_path, monkeypatch):
    writer = writer_at(tmp_path)
    save(writer, 3)

    def full_disk(name, pieces, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.run, "write_pieces", full_disk)
    writer.save(at(7), plain_engine(7.0))
    with pytest.raises(TrainingError, match="No space left.*stage2-00000003.*intact.*repeat the command"):
        writer.finish()
    assert newest_at(tmp_path).position == at(3)


def test_a_state_that_is_not_finite_is_refused_and_leaves_the_one_before(tmp_path):
    writer, engine = writer_at(tmp_path), plain_engine(7.0)
    save(writer, 3)
    engine.module[1].bias.data[1] = float("nan")
    writer.save(at(7), engine)
    words = r"value/1.bias not finite after stage 2, epoch 1, step 7.*stage2-00000003.*intact.*learning rate"
    with pytest.raises(TrainingError, match=words):
        writer.finish()
    assert names(tmp_path) == [3]
    assert len(list((tmp_path / FOLDER).iterdir())) == 1


class SpoiltStage:
    """Two steps are sound; the third has a finite loss and a gradient that is not."""

    number, epochs, global_images = 2, 1, 4

    def __init__(self):
        self.engine = plain_engine(1.0)
        for name in ("set_lr", "remember_buffers", "restore_buffers", "backward"):
            setattr(self.engine, name, lambda *_: None)
        self.engine.step = self.step
        self.done = 0

    def step(self):
        self.done += 1
        if self.done == 3:
            self.engine.module[0].weight.data[0, 0] = float("nan")

    def lr(self, epoch):
        return 1.0

    def num_steps(self, epoch):
        return 9

    def batches(self, epoch, first_step):
        yield from range(first_step, 10)

    def losses(self, batch):
        return {"loss": self.engine.module[0].weight.mean()}

    def identities(self, batch):
        return ["0007"]


def loop_over(writer, due, interrupts=None):
    """Nobody looks on, and nothing interrupts."""
    return Loop(Team(), writer, due, SilentReporter(), interrupts or NoInterrupts())


def test_parameters_spoilt_by_a_gradient_reach_no_checkpoint_and_the_step_is_named(tmp_path):
    writer = writer_at(tmp_path)
    with pytest.raises(TrainingError) as caught:
        loop_over(writer, Due(every_steps=1)).run(SpoiltStage(), at(0))
    said = str(caught.value)
    assert "step 4: loss is not finite" in said and "identities of the batch: 0007" in said
    assert "value/0.weight not finite after stage 2, epoch 1, step 3" in said
    assert "stage2-00000002" in said and "is intact" in said
    assert names(tmp_path) == [1, 2]


class StopInStep(NoInterrupts):
    """Asked to stop in one step."""

    def __init__(self, step):
        self.step, self.steps = step, 0

    def pending(self):
        self.steps += 1
        return Pending(stop=self.steps == self.step, drain_poll=False)


class SoundStage(SpoiltStage):
    epochs = 2

    def step(self):
        self.done += 1


def test_a_stop_in_an_epochs_last_step_does_not_cost_its_evaluation(tmp_path):
    interrupts, evaluated = StopInStep(9), []

    def evaluate(epoch):
        evaluated.append(epoch)
        return dict.fromkeys(("mAP", "R1", "R5", "R10"), 0.25 * epoch)

    def start(position):
        writer = writer_at(tmp_path, keep=9)
        loop = loop_over(writer, Due(every_steps=3, every_epochs=1), interrupts)
        loop.evaluate, loop.evaluates = evaluate, lambda epoch: True
        loop.run(SoundStage(), position)

    with pytest.raises(Preempted):
        start(Position(2, 1, 0, 0, False))
    assert newest_at(tmp_path).position == Position(2, 1, 9, 9, False) and evaluated == []
    start(newest_at(tmp_path).position)
    assert (evaluated, interrupts.steps) == ([1, 2], 18)
    scored = [(m.position.step, m.mAP) for m in read_manifests(Storage(str(tmp_path)))[0] if m.mAP is not None]
    assert scored == [(9, 0.25), (18, 0.5)]


class OtherPieces(Plain):
    """Its pieces do not cover one parameter."""

    def pieces(self, rank):
        yield from list(super().pieces(rank))[1:]


def test_pieces_that_do_not_cover_the_model_are_refused_by_name(tmp_path):
    writer = writer_at(tmp_path)
    writer.save(at(3), Engine(replicated=OtherPieces(3.0), tables=plain_engine(3.0).tables))
    writer.finish()
    engine = plain_engine(0.0)
    with pytest.raises(TrainingError, match="holds 0 elements of 0.weight, the model has 6: it is of another model"):
        newest_at(tmp_path).load(engine, Team())
    assert engine.steps == 0


def test_a_copy_stays_as_it_was_and_its_memory_is_used_again():
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(3), "c": torch.ones(0), "d": torch.randn(5).bfloat16()}
    expected, copy = {name: tensor.clone() for name, tensor in tensors.items()}, HostCopy()
    copy.take(tensors)
    before = [tensor.data_ptr() for tensor in copy.arrive().values()]
    for tensor in tensors.values():
        tensor.zero_()  # Training goes on.
    for name, tensor in copy.arrive().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    copy.take(tensors)
    assert before == [tensor.data_ptr() for tensor in copy.arrive().values()]


def test_tables_are_written_as_they_are_and_the_next_update_waits_for_it(tmp_path, monkeypatch):
    writer, engine = writer_at(tmp_path), plain_engine(3.0)
    begun, go_on, write = threading.Event(), threading.Event(), writer.run.write_pieces

    def slow(name, pieces, **_):
        begun.set()
        go_on.wait(5)
        write(name, pieces)

    monkeypatch.setattr(writer.run, "write_pieces", slow)
    writer.save(at(3), engine)
    begun.wait(5)
    threading.Timer(0.2, go_on.set).start()
    writer.before_update()
    assert go_on.is_set()
    engine.tables[0].block.data.fill_(8.0)
    writer.finish()
    assert loaded(tmp_path) == (3, 3.0)


def test_a_write_that_hangs_is_given_up_with_the_rank(tmp_path, monkeypatch):
    writer = writer_at(tmp_path)
    writer.timeout_s, released = 0.1, threading.Event()
    monkeypatch.setattr(writer.run, "write_pieces", lambda *_: released.wait())
    writer.save(at(3), plain_engine(3.0))
    with pytest.raises(TrainingError, match="rank 0 is not done after 0.1 s.*make room or mend the storage"):
        writer.finish()
    released.set()


class FirstOfTwo(Team):
    """Rank 0, whose partner takes part in collectives but does not write."""

    def all_gather_objects(self, value, operation):
        return [value, (None, None)]


def test_a_missing_rank_is_named_and_the_checkpoint_does_not_count(tmp_path):
    writer = writer_at(tmp_path)
    writer.team, writer.timeout_s = FirstOfTwo(0, 2), 0.1
    writer.save(at(3), plain_engine(3.0))
    with pytest.raises(TrainingError, match="rank-1-of-2.safetensors"):
        writer.finish()
    assert names(tmp_path) == []


def test_a_complete_checkpoint_is_not_written_again(tmp_path):
    done = at(3)._replace(epoch_done=True)
    writer = writer_at(tmp_path)
    writer.save(done, plain_engine(3.0), mAP=0.5)
    writer.finish()
    for again in (writer, writer_at(tmp_path)):
        assert newest_at(tmp_path).position == done
        again.save(Position(2, 2, 0, 3, False), plain_engine(3.0))
        again.finish()
        (manifest,) = read_manifests(Storage(str(tmp_path)))[0]
        assert (manifest.position, manifest.mAP) == (done, 0.5)


def engine_of(team):
    """Two tables whose elements count from 0, the second of fewer rows than there are ranks."""
    tables = []
    for name, identities, width in (("rows", 11, 3), ("few", 2, 5)):
        whole = torch.arange(float(identities * width)).view(identities, width)
        trained = TrainedTable(name, table_of(whole, team), weight_decay=0.0)
        for add, key in enumerate(MOMENTS, 1):
            getattr(trained.piece(), key).copy_(trained.piece().value + add)
        tables.append(trained)
    return Engine(tables=tables)


def save_by_all(team, folder):
    writer = writer_at(folder, team=team)
    writer.timeout_s = 20
    writer.save(at(3), engine_of(team))
    writer.finish()


def load_by_all(team, folder):
    """Whether this rank's rows are what they were."""
    engine, expected = engine_of(team), engine_of(team)
    for table in engine.tables:
        for key in KEYS:
            getattr(table.piece(), key).zero_()
    newest_at(folder, team=team).load(engine, team)
    pairs = zip(engine.tables, expected.tables, strict=True)
    return [torch.equal(getattr(a.piece(), key), getattr(b.piece(), key)) for a, b in pairs for key in KEYS]


@pytest.mark.parametrize(("writers", "readers"), [(4, 3), (3, 1), (1, 2), (2, 4)])
def test_tables_are_read_by_fewer_and_by_more_ranks_than_wrote_them(tmp_path, writers, readers):
    on_processes(writers, save_by_all, str(tmp_path))
    assert on_processes(readers, load_by_all, str(tmp_path)) == [[True] * 6] * readers


def test_due_by_steps_by_epochs_and_by_the_clock_until_saved():
    now = [0.0]
    due = Due(every_steps=4, every_minutes=1, every_epochs=2, clock=lambda: now[0])

    def owed_after(remember):
        remember()
        owed, due.owed = due.owed, False
        return owed

    assert [s for s in range(1, 9) if owed_after(lambda s=s: due.after_step(s, asked=False))] == [4, 8]
    assert [e for e in range(1, 6) if owed_after(lambda e=e: due.after_epoch(e, is_last=e == 5))] == [2, 4, 5]
    now[0] = 59
    assert not due.by_clock()
    now[0] = 61
    assert due.by_clock()
    due.after_step(1, asked=True)
    due.after_step(2, asked=False)
    assert due.owed
    due.saved()
    assert not due.owed and not due.by_clock()
