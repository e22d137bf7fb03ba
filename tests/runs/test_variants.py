"""Every variant of the method, from the table of the paper's ablations: a few steps on two processes.

All variants run one after the other in the same two processes, through the worker that a real run uses; the tests
then look at what each one left in its run folder.
"""

import json
import math
from itertools import combinations

import pytest
import torch

from clipreid.weights.file import load_model, load_models, read_card
from clipreid.weights.initial import build_models
from cluster.settings.yaml_file import parse_config
from cluster.training.worker import train
from tests.helpers.processes import on_processes
from tests.helpers.shards import write_shards
from tests.helpers.tolerances import close

TRAIN = {f"t{number}": 4 for number in range(8)}
TEST = {f"q{number}": 3 for number in range(4)}
BASE = {
    "data.loaders": 0,
    "model.arch": "configs/models/tiny_vit.json",
    "model.pretrained": None,
    "model.image_size": [32, 16],
    "stage1.epochs": 1,
    "stage1.batch": 12,
    "stage2.epochs": 1,
    "stage2.lr": 1e-3,
    "stage2.identities": 4,
    "stage2.images_per_identity": 2,
    "stage2.warmup_epochs": 0,
    "stage2.milestones": [],
    "stage2.text_weight": 0.5,
    "augment.pad": 2,
    "checkpoint.every_minutes": 0,
    "cluster.launcher": "torchrun",
    "eval.batch": 8,
}
DESCRIPTORS = [parts for size in (1, 2, 3) for parts in combinations(("pre", "img", "proj"), size)]
VARIANTS = {
    "two_stage": {},
    "baseline": {"method": "baseline", "stages": [2], "stage2.text_loss": "none", "stage2.id_weight": 1.0},
    "one_stage": {"method": "one_stage", "stages": [2]},
    **{f"text_loss={name}": {"stage2.text_loss": name} for name in ("none", "i2t", "i2t+t2i", "i2tce+t2i")},
    "features=average": {"stage1.features": "average"},
    "triplet_levels=2": {"stage2.triplet_levels": 2},
    **{f"prompt_tokens={tokens}": {"model.prompt_tokens": tokens} for tokens in (1, 8)},
    **{f"descriptor={'+'.join(parts)}": {"eval.descriptor": list(parts)} for parts in DESCRIPTORS},
    **{
        f"sie={sie},{tokens}": {"model.sie": sie, "model.sie_tokens": tokens}
        for sie in ("camera", "view", "camera+view")
        for tokens in ("cls", "all")
    },
    "stride=6": {"model.stride": 6},
    "resnet": {"model.arch": "configs/models/tiny_rn.json"},
}
"""The default is two_stage; every other one is named after what it changes."""


def config_of(folder, name):
    tree = {}
    settings = BASE | VARIANTS[name] | {"run.dir": f"{folder}/{name}", "data.shards": f"{folder}/shards"}
    for key, value in settings.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    return parse_config(tree)


def run_all(team, folder):
    """{variant: metrics} on this rank."""
    metrics = {}
    for name in VARIANTS:
        try:
            metrics[name] = train(config_of(folder, name), team)
        except Exception as error:
            raise AssertionError(f"variant {name} failed") from error
    return metrics


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, and each rank's metrics."""
    folder = tmp_path_factory.mktemp("variants")
    write_shards(folder / "shards", {"train": TRAIN, "query": TEST, "gallery": TEST})
    return folder, on_processes(2, run_all, str(folder))


def log_of(folder, name):
    return [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]


def parts_of(config):
    """Loss parts that stage 2 has to report."""
    levels = ("pre", "img", "proj")[3 - config.stage2.triplet_levels :]
    text = "i2t+t2i" if config.method == "one_stage" else config.stage2.text_loss
    texts = [] if text == "none" else [*text.split("+"), "text"]
    return {"id_img", "id_proj", *(f"tri_{level}" for level in levels), "id", "triplet", *texts, "loss"}


def total_of(entry, config):
    """The loss that trains, put together from the logged parts."""
    if entry["stage"] == 1:
        return entry["t2i"] + (0.0 if config.stage1.features == "average" else entry["i2t"])
    s = config.stage2
    identity = s.id_weight * (entry["id_img"] + entry["id_proj"])
    triplet = s.triplet_weight * sum(value for part, value in entry.items() if part.startswith("tri_"))
    return identity + triplet + s.text_weight * sum(entry.get(part, 0.0) for part in ("i2tce", "i2t", "t2i"))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_logs_its_loss_parts_all_finite(runs, name):
    folder, config = runs[0], config_of(runs[0], name)
    log = log_of(folder, name)
    items = len(TRAIN) if config.stage1.features == "average" else sum(TRAIN.values())
    steps = [[entry["step"] for entry in log if entry["stage"] == stage] for stage in (1, 2)]
    assert steps[0] == list(range(1, 1 + (math.ceil(items / 12) if 1 in config.stages else 0)))
    assert len(steps[1]) >= 2 and steps[1] == list(range(1, 1 + len(steps[1])))
    stage1_parts = {"t2i", "loss"} | (set() if config.stage1.features == "average" else {"i2t"})
    for entry in log:
        parts = stage1_parts if entry["stage"] == 1 else parts_of(config)
        assert set(entry) == {"stage", "epoch", "step", "lr", "images_per_s"} | parts
        assert all(math.isfinite(value) for value in entry.values())
        close(entry["loss"], total_of(entry, config), rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_moves_what_it_trains_and_nothing_else(runs, name):
    folder, config = runs[0], config_of(runs[0], name)
    path = folder / name / "model.safetensors"
    model, spec = load_model(path)
    _, text, tables = load_models(path)
    fresh_model, fresh_text, fresh_tables = build_models(spec, None, config.run.seed)
    start = dict(fresh_model.named_parameters())
    still = {n for n, p in model.named_parameters() if torch.equal(p, start[n])}
    assert still == {n for n in start if not start[n].requires_grad}
    for table, fresh in zip(tables.classifiers, fresh_tables.classifiers, strict=True):
        assert (table.block != fresh.block).any(dim=-1).all(), table.name
    moved = (tables.tokens.block != fresh_tables.tokens.block).any(dim=-1)
    assert moved.all() if config.method != "baseline" else not moved.any()
    start = dict(fresh_text.named_parameters())
    assert all(torch.equal(p, start[n]) for n, p in text.named_parameters() if not start[n].requires_grad)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_metrics_the_same_on_both_ranks(runs, name):
    folder, (first, second) = runs
    written = json.loads((folder / name / "metrics.json").read_text())
    assert first[name] == second[name] == written
    for metrics in (written, written["untrained"]):
        assert all(0 <= metrics[key] <= 1 for key in ("mAP", "mINP", "R1", "R5", "R10"))
        assert metrics["valid_queries"] == metrics["queries"] == sum(TEST.values())


def test_variants_train_differently_but_for_the_descriptor(runs):
    curves = {name: tuple((entry["stage"], entry["loss"]) for entry in log_of(runs[0], name)) for name in VARIANTS}
    same = {name for name, curve in curves.items() if curve == curves["two_stage"]}
    assert same == {"two_stage", *(name for name in VARIANTS if name.startswith("descriptor="))}
    assert len(set(curves.values())) == len(VARIANTS) - len(same) + 1


def test_a_descriptor_has_its_own_metrics(runs):
    """The default one is tried under its own name too. Coarser figures than mAP may agree by chance."""
    measured = {parts: runs[1][0][f"descriptor={'+'.join(parts)}"]["mAP"] for parts in DESCRIPTORS}
    assert measured["img", "proj"] == runs[1][0]["two_stage"]["mAP"]
    assert len(set(measured.values())) == len(DESCRIPTORS)


def test_the_sizes_of_a_variant_are_in_its_weights(runs):
    def models(name):
        path = runs[0] / name / "model.safetensors"
        return load_models(path)

    for tokens in ("cls", "all"):
        sie = [models(f"sie={sie},{tokens}")[0].cv_embed for sie in ("camera", "view", "camera+view")]
        assert [len(table) for table in sie] == [3, 2, 6]
    assert [models(f"prompt_tokens={tokens}").tables.tokens.block.shape[1] for tokens in (1, 8)] == [1, 8]
    assert read_card(runs[0] / "descriptor=pre+proj" / "model.safetensors").descriptor == ("pre", "proj")
