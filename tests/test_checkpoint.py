"""Checkpoints: complete or not counted, damaged ones skipped by name, old ones kept or removed as asked."""

import json
import logging

import pytest
import safetensors.torch
import torch
from torch import nn

from cluster.checkpoint import Checkpoints, Due
from cluster.config import parse_config, results_settings
from cluster.engine import MOMENTS, Fragment
from cluster.errors import ConfigError, TrainingError
from cluster.host_copy import HostCopy
from cluster.loop import run_stage
from cluster.manifest import FOLDER, Position, check_may_continue, read_manifests
from cluster.storage import Storage
from cluster.team import Team


class PlainEngine:
    """Stands where DeepSpeed's engine would: the checkpoint sees fragments and takes state back as a whole."""

    zero_stage = 1

    def __init__(self, value):
        self.module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.loaded = None
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.fill_(value)
            self.module[1].running_mean.fill_(value)

    def fragments(self, rank):
        for name, p in self.module.named_parameters():
            yield Fragment(name, 0, p.detach().flatten(), p.detach().flatten() + 1, p.detach().flatten() + 2)

    def load(self, full, steps, rank):
        self.loaded = full, steps


def store(folder, keep=2, fingerprint="f", settings=None):
    settings = {} if settings is None else settings
    return Checkpoints(Storage(str(folder)), Team(), settings=settings, fingerprint=fingerprint, keep=keep, timeout_s=5)


def at(total, stage=2):
    return Position(stage, 1, total, total, False)


def save(checkpoints, *totals, mAP=None):
    for total in totals:
        checkpoints.save(at(total), PlainEngine(float(total)), mAP=mAP)
    checkpoints.finish()


def names(folder):
    return [m.position.total for m in read_manifests(Storage(str(folder)))[0]]


def test_the_newest_comes_back_with_values_moments_buffers_and_step_count(tmp_path):
    save(store(tmp_path), 3, 7)
    fresh, engine = store(tmp_path), PlainEngine(0.0)
    found = fresh.newest()
    fresh.load(found, engine)
    full, steps = engine.loaded
    assert (found.position, steps) == (at(7), 7)
    assert [full["0.weight"][k][0].item() for k in ("value", *MOMENTS)] == [7, 8, 9]
    assert engine.module[1].running_mean.tolist() == [7, 7]


def test_keep_newest_and_best_by_map(tmp_path):
    checkpoints = store(tmp_path, keep=2)
    save(checkpoints, 1, mAP=0.9)
    save(checkpoints, 2, mAP=0.5)
    save(checkpoints, 3, 4)
    assert names(tmp_path) == [1, 3, 4]


def test_a_later_stage_is_newer_than_any_step_of_an_earlier_one(tmp_path):
    checkpoints = store(tmp_path)
    checkpoints.save(at(500, stage=1), PlainEngine(1.0))
    checkpoints.save(at(2, stage=2), PlainEngine(2.0))
    checkpoints.finish()
    assert store(tmp_path).newest().position == at(2, stage=2)


def damage(folder, kind):
    newest = sorted((folder / FOLDER).iterdir())[-1]
    weights = next(newest.glob("*.safetensors"))
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif kind == "flipped":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif kind == "unreadable manifest":
        (newest / "manifest.json").write_text("{")
    else:
        (newest / "manifest.json").unlink()
    return weights.name


@pytest.mark.parametrize("kind", ["truncated", "flipped", "unreadable manifest", "no manifest"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_and_named(tmp_path, kind, caplog):
    save(store(tmp_path), 3, 7)
    name = damage(tmp_path, kind)
    with caplog.at_level(logging.WARNING):
        assert store(tmp_path).newest().position == at(3)
    if kind in ("truncated", "flipped"):
        assert name in caplog.text
    elif kind == "unreadable manifest":
        assert "manifest.json is damaged" in caplog.text


def test_what_an_interrupted_write_left_is_removed_by_the_next(tmp_path):
    left = tmp_path / FOLDER / "stage2-00000009-dead"
    left.mkdir(parents=True)
    (left / "rank-0-of-1.safetensors").write_bytes(b"half")
    save(store(tmp_path), 3)
    assert not left.exists()


def test_a_failed_write_is_reported_and_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoints = store(tmp_path)
    save(checkpoints, 3)

    def full_disk(name, *parts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.run, "write", full_disk)
    checkpoints.save(at(7), PlainEngine(7.0))
    with pytest.raises(TrainingError, match="No space left.*stage2-00000003.*intact.*repeat the command"):
        checkpoints.finish()
    assert store(tmp_path).newest().position == at(3)


def test_a_state_that_is_not_finite_is_refused_and_leaves_the_one_before(tmp_path):
    checkpoints, engine = store(tmp_path), PlainEngine(7.0)
    save(checkpoints, 3)
    engine.module[1].bias.data[1] = float("nan")
    checkpoints.save(at(7), engine)
    words = r"value/1.bias and 2 more not finite after stage 2, epoch 1, step 7.*stage2-00000003.*intact.*learning rate"
    with pytest.raises(TrainingError, match=words):
        checkpoints.finish()
    assert names(tmp_path) == [3]
    assert len(list((tmp_path / FOLDER).iterdir())) == 1


class SpoiltStage:
    """Two steps are sound; the third has a finite loss and a gradient that is not."""

    number, epochs, global_images = 2, 1, 4

    def __init__(self):
        self.engine = PlainEngine(1.0)
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


class NoNews:
    should_stop = wants_drain_notice = flush = saved = step = lambda *_, **__: False


def test_parameters_spoilt_by_a_gradient_reach_no_checkpoint_and_the_step_is_named(tmp_path):
    checkpoints = store(tmp_path)
    with pytest.raises(TrainingError) as caught:
        run_stage(
            SpoiltStage(), Team(), checkpoints, NoNews(), Due(every_steps=1, every_minutes=0), at(0), every_epochs=0
        )
    said = str(caught.value)
    assert "step 4: loss is not finite" in said and "identities of the batch: 0007" in said
    assert "value/0.weight and 2 more not finite after stage 2, epoch 1, step 3" in said
    assert "stage2-00000002" in said and "is intact" in said
    assert names(tmp_path) == [1, 2]


class OtherPieces(PlainEngine):
    """Its pieces do not cover one parameter."""

    def fragments(self, rank):
        yield from list(super().fragments(rank))[1:]


def test_pieces_that_do_not_cover_the_model_are_refused_by_name(tmp_path):
    checkpoints = store(tmp_path)
    checkpoints.save(at(3), OtherPieces(3.0))
    checkpoints.finish()
    engine = PlainEngine(0.0)
    with pytest.raises(TrainingError, match="holds 0 elements of 0.weight, the model has 6: it is of another model"):
        store(tmp_path).load(store(tmp_path).newest(), engine)
    assert engine.loaded is None


def test_a_copy_is_a_safetensors_file_and_its_memory_is_used_again():
    tensors = {
        "a": torch.randn(3, 2),
        "b": torch.arange(3),
        "c": torch.tensor(7, dtype=torch.uint8),
        "d": torch.ones(0),
    }
    tensors["e"] = torch.randn(5).bfloat16()
    expected, copy = {name: tensor.clone() for name, tensor in tensors.items()}, HostCopy()
    copy.take(tensors)
    before = [part.obj.ctypes.data for part in copy.safetensors({})[1:] if len(part)]
    for tensor in tensors.values():
        tensor.zero_()  # Training goes on.
    found = safetensors.torch.load(b"".join(copy.safetensors({"x": "y"})))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    copy.take(tensors)
    assert before == [part.obj.ctypes.data for part in copy.safetensors({})[1:] if len(part)]


class FirstOfTwo(Team):
    """Rank 0, whose partner takes part in collectives but does not write."""

    def collect(self, value, operation):
        return [value, (None, None)]


def test_a_missing_rank_is_named_and_the_checkpoint_does_not_count(tmp_path):
    checkpoints = store(tmp_path)
    checkpoints.team, checkpoints.timeout_s = FirstOfTwo(0, 2), 0.1
    checkpoints.save(at(3), PlainEngine(3.0))
    with pytest.raises(TrainingError, match="rank-1-of-2.safetensors"):
        checkpoints.finish()
    assert names(tmp_path) == []


def settings_of(folder, **changes):
    tree = {"data": {"shards": "x"}, "run": {"dir": str(folder)}}
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return parse_config(tree)


def test_changes_that_would_change_results_are_refused_by_key_and_harmless_ones_pass(tmp_path):
    settings = json.loads(json.dumps(results_settings(settings_of(tmp_path))))
    save(store(tmp_path, settings=settings), 3)
    check_may_continue(settings_of(tmp_path, stage2__epochs=99, cluster__workers=2, data__loaders=0), "f")
    with pytest.raises(ConfigError, match=r"run.seed: 5.*with 0") as caught:
        check_may_continue(settings_of(tmp_path, run__seed=5, stage2__lr=1e-3), "f")
    assert "stage2.lr" in str(caught.value)
    with pytest.raises(ConfigError, match="is dataset g, the checkpoints"):
        check_may_continue(settings_of(tmp_path), "g")
    with pytest.raises(ConfigError, match="run.resume: never, but"):
        check_may_continue(settings_of(tmp_path, run__resume="never"), "f")
    with pytest.raises(ConfigError, match="neither auto, never, nor a complete checkpoint"):
        check_may_continue(settings_of(tmp_path, run__resume=str(tmp_path / "no")), "f")


def test_due_by_steps_and_by_the_clock():
    now = [0.0]
    due = Due(every_steps=4, every_minutes=1, clock=lambda: now[0])
    assert [step for step in range(1, 9) if due.by_steps(step)] == [4, 8]
    now[0] = 59
    assert not due.by_clock()
    now[0] = 61
    assert due.by_clock()
    due.saved()
    assert not due.by_clock()
