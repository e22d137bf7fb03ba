"""Checkpoints without DeepSpeed: what stands in for it and for all else that the loop needs, and stores to save to,
damage and go on from."""

import torch
from torch import nn

from clipreid.identity_table import IdentityTable
from cluster.errors import Preempted
from cluster.ranks.team import Team
from cluster.run.interrupts import Pending
from cluster.run.manifest import FOLDER, Position, read_manifests
from cluster.run.reporter import SilentReporter
from cluster.run.storage import Storage
from cluster.settings.yaml_file import parse_config
from cluster.training.checkpoint import Retention, find_newest
from cluster.training.checkpoint_writer import CheckpointWriter, Origin
from cluster.training.engine import Engine
from cluster.training.pieces import Piece, slots
from cluster.training.trained_table import TrainedTable


class Log(SilentReporter):
    """Keeps the steps' entries."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def step(self, entry, **_):
        self.entries.append(entry)


class NoInterrupts:
    """Stands where signals and files would ask for a stop."""

    def pending(self):
        return Pending(stop=False, drain_poll=False)

    def confirm(self, pending):
        return Preempted if pending.stop else None


class Plain:
    """Stands where a module under DeepSpeed would."""

    zero_stage = 1

    def __init__(self, value):
        self.module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.fill_(value)
            self.module[1].running_mean.fill_(value)
        self.moments = {n: (p.detach().clone() + 1, p.detach().clone() + 2) for n, p in self.module.named_parameters()}

    def buffers(self):
        return dict(self.module.named_buffers())

    def pieces(self, rank):
        for name, p in self.module.named_parameters():
            yield Piece(name, 0, p.detach().view(-1), *(moment.view(-1) for moment in self.moments[name]))

    def slots(self, rank):
        return slots(self.pieces(rank))

    def numels(self):
        return {name: p.numel() for name, p in self.module.named_parameters()}

    def loaded(self, steps):
        pass


def plain_engine(value):
    """An engine without DeepSpeed: a few parameters, buffers and a table of one column, all of them `value`."""
    table = IdentityTable("rows", 5, torch.full((5, 1), value))
    return Engine(replicated=Plain(value), tables=[TrainedTable("rows", table, weight_decay=0.0)])


def writer_at(folder, keep=2, settings=None, team=None):
    """As a run makes one at its start."""
    run, team = Storage(str(folder)), team or Team()
    search = find_newest(run, team)
    retention = Retention(keep, search.passed_over)
    return CheckpointWriter(run, team, Origin(settings or {}, "f"), retention, timeout_s=5, newest=search.own(run))


def newest_at(folder, resume="auto", team=None):
    """The checkpoint that a run goes on from."""
    return find_newest(Storage(str(folder)), team or Team(), resume).checkpoint


def at(step, stage=2):
    return Position(stage, 1, step, step, False)


def save(writer, *steps, mAP=None):
    for step in steps:
        writer.save(at(step), plain_engine(float(step)), mAP=mAP)
    writer.finish()


def names(folder):
    return [m.position.step for m in read_manifests(Storage(str(folder)))[0]]


def damage(folder, kind):
    last = sorted((folder / FOLDER).iterdir())[-1]
    weights = next(last.glob("*.safetensors"))
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif kind == "flipped":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    elif kind == "unreadable manifest":
        (last / "manifest.json").write_text("{")
    else:
        (last / "manifest.json").unlink()
    return weights.name


def loaded(folder, resume="auto"):
    """The step count and the first weight of the checkpoint that a run goes on from."""
    engine = plain_engine(0.0)
    newest_at(folder, resume).load(engine, Team())
    values = {engine.module[0].weight[0, 0].item(), *engine.tables[0].block.flatten().tolist()}
    assert len(values) == 1
    return engine.steps, values.pop()


def settings_of(folder, **changes):
    tree = {"data": {"shards": "x"}, "run": {"dir": str(folder)}}
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return parse_config(tree)
