"""The files in configs/: the published settings, number by number, and models of the shapes that they imply.

The tables below are written out from the paper's settings a second time, on purpose: they know nothing of bases.
"""

import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from clipreid.model.spec import ModelSpec
from clipreid.weights.initial import empty_models
from clipreid.weights.tables import table_shapes
from cluster.settings.config import Config, flatten
from cluster.settings.model_spec import model_spec
from cluster.settings.yaml_file import load_config

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs"
PERSON = ("market1501", "msmt17", "dukemtmc", "occluded_duke")
VEHICLE = ("veri776", "vehicleid")
DATASETS = (*PERSON, *VEHICLE)

CAMERAS = {"market1501": 6, "msmt17": 15, "dukemtmc": 8, "occluded_duke": 8, "veri776": 20, "vehicleid": 0}
IDENTITIES = {
    "market1501": 751,
    "msmt17": 1041,
    "dukemtmc": 702,
    "occluded_duke": 702,
    "veri776": 576,
    "vehicleid": 13164,
}
VERI_VIEWS = 8

KEYS = (
    "model.image_size",
    "data.pixel_mean",
    "data.pixel_std",
    "stage1.epochs",
    "stage1.batch",
    "stage2.lr",
    "stage2.weight_decay",
    "stage2.epochs",
    "stage2.warmup_factor",
    "stage2.milestones",
    "stage2.id_weight",
    "stage2.label_smoothing",
)
HALF = (0.5, 0.5, 0.5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TALL, SQUARE = (256, 128), (256, 256)
COLUMNS = {
    ("person", "vit"): (TALL, HALF, HALF, 120, 64, 5e-6, 1e-4, 60, 0.1, (30, 50), 0.25, 0.1),
    ("person", "rn50"): (TALL, MEAN, STD, 60, 64, 3.5e-4, 5e-4, 120, 0.01, (40, 70), 1.0, 0.1),
    ("veri776", "vit"): (SQUARE, HALF, HALF, 60, 64, 5e-6, 1e-4, 60, 0.1, (30, 50), 0.25, 0.1),
    ("veri776", "rn50"): (SQUARE, MEAN, STD, 60, 64, 3.5e-4, 5e-4, 120, 0.01, (40, 70), 1.0, 0.1),
    ("vehicleid", "vit"): (SQUARE, HALF, HALF, 60, 256, 5e-5, 1e-4, 60, 0.1, (30, 50), 0.25, 0.1),
    ("vehicleid", "rn50"): (SQUARE, MEAN, STD, 60, 256, 3.5e-4, 5e-4, 120, 0.01, (40, 70), 1.0, 0.0),
}
EVERYWHERE = {
    "model.pretrained": "openai",
    "model.prompt_tokens": 4,
    "model.sie_tokens": "cls",
    "model.sie_coefficient": 1.0,
    "stage1.lr": 3.5e-4,
    "stage1.weight_decay": 1e-4,
    "stage1.warmup_epochs": 5,
    "stage1.warmup_lr": 1e-5,
    "stage1.min_lr": 1e-6,
    "stage1.features": "instance",
    "stage2.bias_lr_factor": 2.0,
    "stage2.identities": 16,
    "stage2.images_per_identity": 4,
    "stage2.warmup_epochs": 10,
    "stage2.gamma": 0.1,
    "stage2.triplet_weight": 1.0,
    "stage2.text_weight": 1.0,
    "stage2.triplet_levels": 3,
    "stage2.margin": 0.3,
    "augment.flip": 0.5,
    "augment.pad": 10,
    "augment.erase": 0.5,
    "eval.descriptor": ("img", "proj"),
    "eval.rerank": None,
    "data.sampler": "identity",
}


def published() -> dict[str, dict]:
    """{file name: {key: value}} of the 30 published settings."""
    table = {}
    for dataset in DATASETS:
        for backbone in ("vit", "rn50"):
            column = COLUMNS["person" if dataset in PERSON else dataset, backbone]
            plain = (
                EVERYWHERE
                | dict(zip(KEYS, column, strict=True))
                | {
                    "data.shards": f"data/{dataset}/shards",
                    "eval.rule": "none" if dataset == "vehicleid" else "camera",
                    "model.arch": {"vit": "ViT-B-16-quickgelu", "rn50": "RN50-quickgelu"}[backbone],
                    "model.sie": "none",
                    "model.stride": None,
                    "method": "two_stage",
                    "stages": (1, 2),
                    "stage2.text_loss": "i2tce",
                }
            )
            table[f"{dataset}_{backbone}"] = plain
            baseline = {"method": "baseline", "stages": (2,), "stage2.text_loss": "none", "stage2.id_weight": 1.0}
            if dataset == "vehicleid":
                baseline["stage2.label_smoothing"] = 0.0
            table[f"{dataset}_{backbone}_baseline"] = plain | baseline
    for dataset in DATASETS[:-1]:
        sie = "camera+view" if dataset == "veri776" else "camera"
        table[f"{dataset}_vit_sie_olp"] = table[f"{dataset}_vit"] | {"model.sie": sie, "model.stride": 12}
    table["vehicleid_vit_olp"] = table["vehicleid_vit"] | {"model.stride": 12}
    return {name: values | {"run.dir": f"runs/{name}"} for name, values in table.items()}


PUBLISHED = published()
FILES = sorted(CONFIGS.glob("*.yaml"))


def dataset_of(name: str) -> str:
    return next(dataset for dataset in DATASETS if name.startswith(dataset))


def settings_of(config: Config) -> dict:
    """Flat {key: value}, with lists as tuples however they were given."""
    return flatten(config.model_dump())


def fake_index(name: str) -> SimpleNamespace:
    """What a model needs to know of the packed dataset."""
    dataset = dataset_of(name)
    return SimpleNamespace(
        cameras=CAMERAS[dataset],
        views=VERI_VIEWS if dataset == "veri776" else 0,
        noun="vehicle" if dataset in VEHICLE else "person",
        split=lambda _: SimpleNamespace(num_identities=IDENTITIES[dataset]),
    )


def test_there_is_one_file_per_published_setting():
    others = {"demo", "demo_from_scratch", "claims", "omniglot", "finetune"}
    assert {path.stem for path in FILES} - others == set(PUBLISHED)
    assert len(PUBLISHED) == 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_loads_and_opens_with_the_command_that_runs_it_and_its_hardware(path):
    load_config(path)
    header = path.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"python launch/train.py --config configs/{path.name}" in header
    assert "GPU" in header


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_are_the_published_ones(name):
    settings = settings_of(load_config(CONFIGS / f"{name}.yaml"))
    assert {key: settings[key] for key in PUBLISHED[name]} == PUBLISHED[name]


def test_no_setting_is_written_twice():
    """Neither in two files of configs/, nor in a file and in the typed defaults."""
    defaults = flatten(Config.model_validate({"data": {"shards": "-"}}).model_dump(mode="json"))
    written = {}
    for path in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("base/*.yaml")]:
        tree = yaml.safe_load(path.read_text())
        if path.stem in PUBLISHED or path.parent != CONFIGS:
            tree.pop("base", None)
            for key, value in flatten(tree).items():
                assert defaults[key] != value, f"{path.name} repeats the default of {key}"
                written.setdefault((key, json.dumps(value)), []).append(path.name)
    assert {fact: places for fact, places in written.items() if len(places) > 1} == {}


def test_every_base_is_used():
    used = {base for path in CONFIGS.rglob("*.yaml") for base in re.findall(r"(\w+\.yaml)", _base_line(path))}
    assert {path.name for path in CONFIGS.glob("base/*.yaml")} <= used


def _base_line(path: Path) -> str:
    return "".join(line for line in path.read_text().splitlines() if line.startswith("base:"))


@cache
def built(spec: str):
    """Both models of a specification (as JSON), without memory behind their tensors."""
    model, text = empty_models(ModelSpec.from_dict(json.loads(spec)))
    return model.to("meta").eval(), text


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_the_shapes_of_the_setting(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    spec = model_spec(config, fake_index(name))
    model, text = built(json.dumps(spec.to_dict(), sort_keys=True))
    vit, square, olp = "_vit" in name, dataset_of(name) in VEHICLE, name.endswith("olp")
    rows, columns = (21, 21 if square else 10) if olp else (16, 16 if square else 8)
    pre, img, proj = (768, 768, 512) if vit else (1024, 2048, 1024)
    identities = IDENTITIES[dataset_of(name)]

    zeros = torch.zeros(2, dtype=torch.int64, device="meta")
    images = torch.empty(2, 3, *config.model.image_size, device="meta")
    assert [tuple(f.shape) for f in model.features(images, zeros, zeros)] == [(2, pre), (2, img), (2, proj)]
    assert spec.grid == (rows, columns)
    positions = [p for n, p in model.named_parameters() if n.endswith("positional_embedding")]
    assert [p.shape for p in positions] == [(rows * columns + 1, img)]
    sie_rows = {"veri776": 20 * 8}.get(dataset_of(name), CAMERAS[dataset_of(name)]) if name.endswith("sie_olp") else 0
    assert (0 if model.cv_embed is None else len(model.cv_embed)) == sie_rows
    assert table_shapes(spec, model, text) == {
        "classifier.weight": (identities, img),
        "classifier_proj.weight": (identities, proj),
        "prompt_learner.tokens": (identities, 4, 512),
    }


@pytest.mark.parametrize(
    ("name", "noun", "width", "projected"), [("demo", "vehicle", 160, 128), ("omniglot", "character", 512, 128)]
)
def test_the_small_examples_build_the_models_they_name(name, noun, width, projected):
    config = load_config(CONFIGS / f"{name}.yaml")
    split = SimpleNamespace(num_identities=100)
    index = SimpleNamespace(cameras=6, views=8, noun=noun, split=lambda _: split)
    spec = model_spec(config, index)
    model, text = built(json.dumps(spec.to_dict(), sort_keys=True))
    features = model.features(torch.empty(2, 3, *config.model.image_size, device="meta"))
    assert (tuple(features.img.shape), tuple(features.proj.shape)) == ((2, width), (2, projected))
    shapes = table_shapes(spec, model, text)
    assert shapes["classifier.weight"] == (100, width) and shapes["prompt_learner.tokens"] == (100, 4, 128)
    assert model.cv_embed is None


def test_the_readme_names_every_published_file():
    text = (CONFIGS / "README.md").read_text()
    assert {name for name in PUBLISHED if f"{name}.yaml" not in text} == set()
