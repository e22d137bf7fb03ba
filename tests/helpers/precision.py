"""The stages as a real run takes them, on a tiny dataset, in a process that lets tests see inside."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipreid.weights.initial import build_models
from cluster.errors import TrainingError
from cluster.run.manifest import Position
from cluster.run.storage import Storage
from cluster.settings.model_spec import model_spec
from cluster.settings.yaml_file import parse_config
from cluster.training.checkpoint import Retention, find_newest
from cluster.training.checkpoint_writer import CheckpointWriter, Due, Origin
from cluster.training.loop import Loop
from cluster.training.pieces import KEYS
from cluster.training.stage1 import Stage1
from cluster.training.stage2 import Stage2
from shards.loading.index import ShardIndex
from tests.helpers.checkpoints import Log, NoInterrupts
from tests.helpers.tables import table_of

LR = 5e-6
RESNET = {"model.arch": "configs/models/tiny_rn.json"}
BASE = {
    "data.loaders": 0,
    "model.arch": "configs/models/tiny_vit.json",
    "model.pretrained": None,
    "model.image_size": [32, 16],
    "stage2.epochs": 1,
    "stage2.lr": LR,
    "stage2.identities": 4,
    "stage2.images_per_identity": 2,
    "stage2.warmup_epochs": 0,
    "stage2.milestones": [],
    "augment.pad": 2,
}


def make_parts(team, folder, **changes):
    """Configuration, index and specification for the shards in `folder`, and the models."""
    tree = {}
    for key, value in (BASE | {"data.shards": f"{folder}/shards"} | changes).items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    config = parse_config(tree)
    index = ShardIndex.open(config.data.shards)
    spec = model_spec(config, index)
    models = build_models(spec, None, seed=0, peers=team)
    if models.text is not None:
        models.text.to(team.device)
    models.tables.to(team.device)
    return config, index, spec, models


def make_stage(team, folder, **changes):
    """Stage 2 on the shards in `folder`, with random text features."""
    config, index, spec, models = make_parts(team, folder, **changes)
    width, generator = models.model.image_encoder.widths[2], torch.Generator().manual_seed(1)
    texts = table_of(torch.randn(spec.identities, width, generator=generator), team, frozen=True)
    return Stage2(config, team, models, texts.to(team.device), index)


def train(team, stage, folder):
    """Run the stage: its log, its newest checkpoint, and the message it stopped with."""
    run = Storage(folder)
    writer = CheckpointWriter(run, team, Origin(settings={}, fingerprint="f"), Retention(keep=2), timeout_s=30)
    log, message = Log(), ""
    try:
        loop = Loop(team, writer, Due(), log, NoInterrupts())
        loop.run(stage, Position(stage.number, 1, 0, 0, False))
    except TrainingError as error:
        message = str(error)
    return log.entries, find_newest(run, team).checkpoint, message


def pieces_of(engine):
    """{parameter: {value, exp_avg, exp_avg_sq}}, flat copies."""
    replicated = [] if engine.replicated is None else list(engine.replicated.pieces(0))
    pieces = [*replicated, *(table.piece() for table in engine.tables)]
    return {piece.name: {key: getattr(piece, key).clone() for key in KEYS} for piece in pieces}


def precision_run(team, folder, precision):
    """How far parameters moved, and the types of what was computed and kept."""
    stage = make_stage(team, folder, **{"train.precision": precision})
    module, inner, types = stage.engine.module, stage.losses, {"losses": set(), "encoder": set()}

    def watched(batch):
        parts = inner(batch)
        types["losses"] |= {part.dtype for part in parts.values()}
        return parts

    stage.losses = watched
    mlp = module.image_encoder.transformer.resblocks[0].mlp
    mlp.register_forward_hook(lambda _, __, out: types["encoder"].add(out.dtype))
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    log, _, _ = train(team, stage, f"{folder}/{precision}")
    types["parameters"] = {p.dtype for p in module.parameters()}
    types["state"] = {value.dtype for piece in pieces_of(stage.engine).values() for value in piece.values()}
    moved = {name: p.detach() - before[name] for name, p in module.named_parameters() if name in before}
    stage.close()
    return {"log": log, "types": types, "moved": moved}


def failing_run(team, folder, kind):
    """A ResNet whose third step meets what is not finite: the message, and the state before and in the checkpoint.

    kind: "text" (a text feature is NaN), "loss" (a part is infinite), "parameter" (the step before spoilt one).
    """
    stage = make_stage(team, folder, **RESNET, **{"stage2.lr": 1e-3})
    engine, inner, before, batches = stage.engine, stage.losses, {}, []

    def poisoned(batch):
        batches.append(sorted(stage.identities(batch)))
        if len(batches) == 3:
            before["pieces"] = pieces_of(engine)
            before["buffers"] = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
            if kind == "text":
                stage.text_features.block[0] = torch.nan
            elif kind == "parameter":
                next(engine.module.parameters()).data[0] = torch.nan
            else:
                parts = inner(batch)
                return parts | {"tri_img": parts["tri_img"] + torch.inf}
        return inner(batch)

    stage.losses = poisoned
    log, newest, message = train(team, stage, f"{folder}/{kind}")
    saved = {}
    if newest is not None:
        fresh = make_stage(team, folder, **RESNET)
        newest.load(fresh.engine, team)
        saved["pieces"] = pieces_of(fresh.engine)
        saved["buffers"] = dict(fresh.engine.module.named_buffers())
        saved["position"] = newest.position
        fresh.close()
    stage.close()
    return {"message": message, "identities": batches[-1], "steps": len(log), "before": before, "saved": saved}


def failing_stage1(team, folder):
    """Stage 1 over 64 images, 16 in a batch, whose third batch holds an image with a feature that is NaN."""
    config, index, spec, models = make_parts(team, folder, **{"stage1.batch": 16, "stage1.epochs": 1})
    rows = index.split("train")
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(len(rows.labels), spec.arch_config["embed_dim"], generator=generator).numpy()
    stage = Stage1(config, team, models.text.eval(), models.tables.tokens, bank, rows)
    batches = list(stage.batches(1, 1))
    bank[batches[2][0], 3] = float("nan")
    before, inner = [], stage.losses

    def watched(batch):
        before.append(pieces_of(stage.engine))
        return inner(batch)

    stage.losses = watched
    log, newest, message = train(team, stage, f"{folder}/stage1-{team.world_size}")
    newest.load(stage.engine, team)
    saved = {"pieces": pieces_of(stage.engine), "position": newest.position}
    identities = sorted(stage.identities(batches[2]))
    stage.close()
    return {"message": message, "identities": identities, "steps": len(log), "before": before[2], "saved": saved}


def one_rank_fails(team, folder):
    """The message on each rank of a team about a loss that is infinite on the last one alone, in the second step."""
    stage = make_stage(team, folder)
    inner, batches = stage.losses, []

    def poisoned(batch):
        batches.append(stage.identities(batch))
        parts = inner(batch)
        if len(batches) == 2 and team.rank == team.world_size - 1:
            return parts | {"tri_img": parts["tri_img"] + torch.inf}
        return parts

    stage.losses = poisoned
    log, newest, message = train(team, stage, f"{folder}/one-of-{team.world_size}")
    position = newest.position
    stage.close()
    return {"message": message, "identities": batches[-1], "steps": len(log), "position": position}


class Synchronisations(TorchDispatchMode):
    """Notes every operation that makes the host wait for a GPU: a value read, or a shape that depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if "index" in name and isinstance(args[1], list | tuple) else ()
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if masked or name in self.NAMES or "unique" in name:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def synchronisations(team, folder, changes):
    """What a warm step makes the host wait for a GPU with: operations, and waits that DeepSpeed asks for."""
    stage = make_stage(team, folder, **changes)
    from deepspeed.accelerator import get_accelerator

    waits, watched = [], Synchronisations()
    accelerator = type(get_accelerator())
    kept, accelerator.synchronize = accelerator.synchronize, lambda *_: waits.append("synchronize")
    batches = list(stage.batches(1, 1))
    for batch in batches[:3]:  # DeepSpeed's own timer starts late.
        _step(stage, batch)
    waits.clear()
    with watched:
        _step(stage, batches[3])
    accelerator.synchronize = kept
    stage.close()
    return watched.found + waits


def _step(stage, batch):
    stage.engine.remember_buffers()
    parts = stage.losses(batch)
    stage.engine.backward(parts["loss"])
    stage.engine.step()


def compiled_losses(team, folder, compiled):
    """Logged losses of a run, eager or compiled, and how many graphs were compiled for it."""
    stage = make_stage(team, folder, **{"train.compile": compiled, "stage2.lr": 1e-3})
    log, _, _ = train(team, stage, f"{folder}/compile-{compiled}")
    stage.close()
    return [entry["loss"] for entry in log], torch._dynamo.utils.counters["stats"]["unique_graphs"]
