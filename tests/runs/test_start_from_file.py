"""Training that starts from a checkpoint: of the paper's authors, or of our own; and files that cannot start it."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from clipreid.weights.card import read_card
from clipreid.weights.file import ModelCard, load_model, save_model
from clipreid.weights.initial import build_models
from clipreid.weights.initial import start as start_of
from clipreid.weights.official import save_official
from clipreid.weights.tables import TOKENS, load_table
from clipreid.weights.transfer import side_information
from cluster.checks.before_run import check_run
from cluster.errors import ConfigError
from cluster.settings.yaml_file import parse_config
from cluster.training.worker import train
from launch.cli import load_settings
from shards.loading.index import ShardIndex
from tests.helpers.golden_models import ROOT_CONFIGS
from tests.helpers.processes import on_processes
from tests.helpers.runs import ROOT, launch
from tests.helpers.settings import model_spec
from tests.helpers.shards import write_shards

IDENTITIES = {f"t{number}": 4 for number in range(8)}


def settings(folder, pretrained, *, run="run", **changes):
    model = {"arch": "configs/models/tiny_vit.json", "image_size": [32, 16], "pretrained": str(pretrained)}
    tree = {
        "run": {"dir": str(folder / run)},
        "data": {"shards": str(folder / "shards"), "loaders": 0},
        "model": model | changes.pop("model", {}),
        "stages": [2],
        "stage1": {"epochs": 1, "batch": 12},
        "stage2": {"epochs": 1, "lr": 1e-3, "identities": 4, "images_per_identity": 2, "warmup_epochs": 0},
        "augment": {"pad": 2},
        "cluster": {"launcher": "local"},
    }
    return parse_config(tree | changes)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a packed dataset and the same weights as the authors write them, with and without prompts, and as
    we do; and the text side."""
    folder = tmp_path_factory.mktemp("start")
    write_shards(folder / "shards", {"train": IDENTITIES, "query": {"q": 3, "r": 3}, "gallery": {"q": 3, "r": 3}})
    spec = check_run(settings(folder, folder / "none", model={"pretrained": None}, stages=[1, 2])).spec
    models = build_models(spec, seed=7)
    save_official(folder / "official.pth", models.state_dict(), spec)
    (folder / "official.pth").with_suffix(".bin").write_bytes((folder / "official.pth").read_bytes())
    image_side = models._replace(text=None, tables=replace(models.tables, tokens=None))
    save_official(folder / "baseline.pth", image_side.state_dict(), spec)
    save_model(folder / "model.safetensors", models, ModelCard(spec, (0.5,) * 3, (0.5,) * 3, ("img", "proj")))
    return folder, models.tables.tokens.block


def train_all(team, folder, files):
    for file in files:
        config = settings(folder, folder / file, run=f"run-{file}")
        check_run(config)
        train(config, team)


def test_stage_2_starts_from_a_checkpoint_of_the_authors_or_of_ours(start):
    folder, tokens = start
    files = ("official.pth", "official.bin", "model.safetensors")
    on_processes(1, train_all, folder, files)
    logs = [(folder / f"run-{file}" / "log.jsonl").read_text() for file in files]
    losses = [
        [(entry["step"], entry["i2tce"], entry["loss"]) for entry in map(json.loads, log.splitlines())] for log in logs
    ]
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) > 1
    for file in files:
        run = folder / f"run-{file}" / "model.safetensors"
        assert torch.equal(load_table(run, TOKENS).block, tokens)
        assert not torch.equal(
            load_model(run)[0].image_encoder.proj, load_model(folder / "model.safetensors")[0].image_encoder.proj
        )


ONE_STAGE = {"method": "one_stage"}
FAULTS = [
    ("baseline.pth", {}, "has no text side, which method two_stage needs: give CLIP's weights or a checkpoint with"),
    ("baseline.pth", {"stages": [1, 2]}, "has no text side"),
    ("baseline.pth", {"stages": [1]}, "has no text side"),
    ("baseline.pth", {"stage1": {"result": "model.safetensors"}}, "has no text side"),
    ("baseline.pth", ONE_STAGE, "has no text side, which method one_stage needs"),
    ("clip.pt", {}, "holds no prompts: name a stage1.safetensors as stage1.result, or train them"),
    ("official.pth", {"model": {"image_size": [32, 32]}}, r"positional_embedding is \(9, 32\), .* needs \(17, 32\)"),
    ("official.pth", {"model": {"prompt_tokens": 2}}, r"cls_ctx is \(8, 4, 16\), the configuration needs \(8, 2, 16\)"),
    ("other.pth", {}, r"classifier_proj.weight is \(8, 16\), the configuration needs \(5, 16\)"),
    ("others.pth", {}, "holds prompts of other identities alone: name a stage1.safetensors as stage1.result, or train"),
    ("nothing", {}, "holds no model.safetensors: not a run folder, or the run has not finished"),
]


@pytest.fixture
def misfits(start):
    """Beside the other files: CLIP's weights alone, and a checkpoint of fewer identities."""
    folder, _ = start
    state = load_file(folder / "model.safetensors")
    clip = {
        name.replace("image_encoder.", "visual.").replace("text_encoder.", ""): value
        for name, value in state.items()
        if name.startswith(("image_encoder.", "text_encoder."))
    }
    rows = torch.cat([clip["visual.positional_embedding"][:1], torch.zeros(16, 32)])
    torch.save(
        clip | {"visual.positional_embedding": rows, "token_embedding.weight": torch.zeros(49408, 16)},
        folder / "clip.pt",
    )
    official = torch.load(folder / "official.pth", weights_only=True)
    torch.save(official | {"classifier.weight": torch.zeros(5, 32)}, folder / "other.pth")
    torch.save(of_identities(official, 5), folder / "others.pth")
    (folder / "nothing").mkdir(exist_ok=True)
    return folder


def of_identities(official, count):
    """A checkpoint of the authors with the rows of so many identities."""
    tables = ("classifier.weight", "classifier_proj.weight", "prompt_learner.cls_ctx")
    return official | {name: official[name][:count].clone() for name in tables}


@pytest.mark.parametrize(("file", "changes", "reason"), FAULTS)
def test_a_file_that_cannot_start_the_run_is_refused_before_any_worker(file, changes, reason, misfits):
    changes = {key: dict(value) if isinstance(value, dict) else value for key, value in changes.items()}
    if "stage1" in changes:
        changes["stage1"]["result"] = str(misfits / changes["stage1"]["result"])
    with pytest.raises(ConfigError, match=reason) as caught:
        check_run(settings(misfits, misfits / file, **changes))
    assert "\n" not in str(caught.value) and file in str(caught.value)


def test_a_baseline_starts_without_a_text_side(start):
    folder, _ = start
    baseline = {"identities": 4, "images_per_identity": 2, "text_loss": "none"}
    check_run(settings(folder, folder / "baseline.pth", method="baseline", stage2=baseline))


def begun(folder, pretrained, **changes):
    """What the checks say of a start, and the models that workers begin with."""
    config = settings(folder, pretrained, **changes)
    checked = check_run(config)
    index = checked.index
    return str(checked.origin), start_of(checked.spec, str(pretrained), 3, dataset=index.fingerprint).models


STAGES = {"stages": [1, 2]}


@pytest.mark.parametrize("count", [5, 8])
def test_an_authors_checkpoint_of_any_number_of_identities_starts_a_run(count, start, tmp_path):
    folder, tokens = start
    official = torch.load(folder / "official.pth", weights_only=True)
    torch.save(of_identities(official, count), tmp_path / "ours.pth")
    told, models = begun(folder, tmp_path / "ours.pth", **STAGES)
    assert torch.equal(models.model.image_encoder.proj, official["image_encoder.proj"])
    assert torch.equal(models.text.text_encoder.text_projection, official["text_encoder.text_projection"])
    assert [len(table.block) for table in models.tables] == [8, 8, 8]
    drawn = build_models(check_run(settings(folder, tmp_path / "ours.pth", **STAGES)).spec, seed=3).tables
    same = "classifiers and prompts of 8 identities"
    if count == 8:
        assert torch.equal(models.tables.tokens.block, tokens) and "begins anew" not in told and f", {same}" in told
    else:
        assert all(torch.equal(ours.block, anew.block) for ours, anew in zip(models.tables, drawn, strict=True))
        assert told.endswith(f"begins anew: {same} (those of the weights are of 5 others)")
    assert told.startswith(f"from {tmp_path / 'ours.pth'}: kept: image encoder and necks, text encoder, whose prompts")


def test_side_information_is_kept_for_the_cameras_that_both_have(start, tmp_path):
    folder, _ = start
    official = torch.load(folder / "official.pth", weights_only=True)
    rows = torch.arange(5.0)[:, None].expand(5, 32).clone()
    for name, theirs in (("more", rows), ("fewer", rows[:2]), ("none", None)):
        state = official if theirs is None else official | {"cv_embed": theirs}
        torch.save(state, tmp_path / f"{name}.pth")
    camera = {"model": {"sie": "camera"}}
    told, models = begun(folder, tmp_path / "more.pth", **STAGES, **camera)
    assert torch.equal(models.model.cv_embed, rows[:3])
    assert "side information in 3 of 3 rows" in told and told.endswith("left out: 2 rows of side information")
    told, models = begun(folder, tmp_path / "fewer.pth", **STAGES, **camera)
    assert torch.equal(models.model.cv_embed[:2], rows[:2]) and 0 < models.model.cv_embed[2].abs().max() < 0.1
    assert "side information in 2 of 3 rows" in told and "begins anew: side information in 1 of 3 rows" in told
    told, models = begun(folder, tmp_path / "none.pth", **STAGES, **camera)
    assert 0 < models.model.cv_embed.abs().max() < 0.1 and "begins anew: side information in 3 of 3 rows" in told
    told, models = begun(folder, tmp_path / "more.pth", **STAGES)
    assert models.model.cv_embed is None and told.endswith("left out: 5 rows of side information")


def test_rows_of_cameras_and_views_are_kept_by_both():
    """Row camera * views + view, whatever the numbers of either in the two datasets."""
    fields = {"sie": "camera+view", "image_size": (32, 16), "noun": "vehicle"}
    new = model_spec(str(ROOT_CONFIGS / "tiny_vit.json"), cameras=3, views=2, **fields)
    old = replace(new, cameras=2, views=3)
    theirs, drawn = torch.arange(6.0)[:, None].repeat(1, 4), torch.full((6, 4), -1.0)
    card = ModelCard(old, (0.5,) * 3, (0.5,) * 3, ("img",))
    table, kept = side_information(theirs, drawn, new, card)
    assert table[:, 0].tolist() == [0, 1, 3, 4, -1, -1] and kept == 4
    assert side_information(theirs, drawn, replace(new, sie="camera"), card)[1] == 0
    assert side_information(theirs[:4], drawn, new, None)[1] == 0  # the authors' files do not say which rows are views
    assert side_information(theirs, drawn, new, None)[1] == 6


def test_our_own_weights_know_that_another_dataset_has_other_identities(start, tmp_path):
    """As many as before, and of another fingerprint: a run folder, whose settings need not be repeated."""
    folder, tokens = start
    (run := tmp_path / "run").mkdir()
    spec = read_card(folder / "model.safetensors").spec
    models = build_models(replace(spec, noun="vehicle"), seed=7)
    for fingerprint, same in (("another", False), (ShardIndex.open(str(folder / "shards")).fingerprint, True)):
        facts = {"dataset": {"name": "x", "fingerprint": fingerprint, "url": ""}}
        card = ModelCard(replace(spec, noun="vehicle"), (0.5,) * 3, (0.4,) * 3, ("img",), facts)
        save_model(run / "model.safetensors", models, card)
        told, begun_models = begun(folder, run, **STAGES)
        assert torch.equal(begun_models.tables.tokens.block, tokens) == same
        assert ("(those of the weights are of 8 others)" in told) != same and "prompts say 'vehicle'" in told


def test_settings_that_are_not_given_are_those_of_the_weights(start, tmp_path):
    folder, _ = start
    spec = read_card(folder / "model.safetensors").spec
    models = build_models(spec, seed=7)
    (run := tmp_path / "run").mkdir()
    save_model(run / "model.safetensors", models, ModelCard(spec, (0.5,) * 3, (0.4,) * 3, ("img",)))
    (tmp_path / "mine.yaml").write_text(f"data: {{shards: {folder / 'shards'}}}\nmodel: {{prompt_tokens: 2}}\n")
    options = Namespace(config=str(tmp_path / "mine.yaml"), overrides=[f"model.pretrained={run}"])
    config = load_settings(options)
    assert config.model.arch == spec.arch and config.model.image_size == (32, 16)
    assert config.data.pixel_std == (0.4,) * 3 and config.eval.descriptor == ("img",)
    assert config.model.prompt_tokens == 2
    assert load_settings(Namespace(config=options.config, overrides=[])).model.arch == "ViT-B-16-quickgelu"


def test_a_run_goes_on_from_another_run_with_other_identities(start, tmp_path):
    """Whole: stage 1 anew, then stage 2, from the command that a user gives; and what began how is printed."""
    folder, _ = start
    few = {f"n{number}": 4 for number in range(4)}
    write_shards(tmp_path / "few", {"train": few, "query": {"q": 3, "r": 3}, "gallery": {"q": 3, "r": 3}})
    (run := tmp_path / "before").mkdir()
    (run / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    base = ["--config", str(ROOT / "configs" / "finetune.yaml"), f"data.shards={tmp_path / 'few'}", "data.loaders=0"]
    short = ["stage1.epochs=1", "stage2.epochs=1", "stage2.images_per_identity=2", f"run.dir={tmp_path / 'after'}"]
    assert (
        launch("train.py", *base, *short, f"model.pretrained={run}").stdout.count(
            "begins anew: classifiers and prompts of 4 identities (those of the weights are of 8 others)"
        )
        == 1
    )
    card = read_card(tmp_path / "after")
    assert card.spec.identities == 4 and card.spec.image_size == (32, 16)
    assert len(load_table(tmp_path / "after", TOKENS).block) == 4
