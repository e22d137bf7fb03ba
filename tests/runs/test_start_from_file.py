"""Training that starts from a checkpoint: of the paper's authors, or of our own; and files that cannot start it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from clipreid.weights.file import ModelCard, load_model, save_model
from clipreid.weights.initial import build_models
from clipreid.weights.official import save_official
from clipreid.weights.tables import TOKENS, load_table
from cluster.checks.before_run import check_run
from cluster.errors import ConfigError
from cluster.settings.yaml_file import parse_config
from cluster.training.worker import train
from tests.helpers.processes import on_processes
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
    spec = check_run(settings(folder, folder / "none", model={"pretrained": None}, stages=[1, 2]))[1]
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
    ("official.pth", {"model": {"sie": "camera"}}, r"cv_embed is missing, the configuration needs \(3, 32\)"),
    ("official.pth", {"model": {"prompt_tokens": 2}}, r"cls_ctx is \(8, 4, 16\), the configuration needs \(8, 2, 16\)"),
    ("other.pth", {}, r"classifier.weight is \(5, 32\), the configuration needs \(8, 32\)"),
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
    return folder


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
