"""Every entry point × everything that the operating system refuses: one line that names the place, exit code 2."""

import sys

import numpy as np
import pytest

from clipreid.weights.card import ModelCard
from clipreid.weights.file import save_model
from clipreid.weights.initial import build_models
from cluster.evaluation.feature_file import write_features
from launch import cli, evaluate, export, extract, figures, pack, status, train
from tests.helpers.refusals import WAYS, little_space, too_many_open_files
from tests.helpers.runs import ROOT, TINY
from tests.helpers.settings import model_spec
from tests.helpers.shards import picture, write_shards


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the commands read: a packed dataset, images with a table, weights, features."""
    folder = tmp_path_factory.mktemp("files")
    splits = {"train": {f"t{n}": 4 for n in range(4)}, "query": {"a": 2, "b": 2}, "gallery": {"a": 3, "b": 3}}
    shards = write_shards(folder / "shards", splits)
    (folder / "images").mkdir()
    rows = ["path,identity,split"]
    for number in range(12):
        (folder / "images" / f"{number}.jpg").write_bytes(picture(number, 200, 200))
        rows.append(f"images/{number}.jpg,id{number % 3},train")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    spec = model_spec(str(ROOT / TINY["model.arch"]), image_size=(32, 32), identities=4, cameras=3, noun="thing")
    card = ModelCard(spec, (0.5,) * 3, (0.5,) * 3, ("img", "proj"))
    save_model(folder / "model.safetensors", build_models(spec), card)
    arrays = {
        "features": np.random.default_rng(0).normal(size=(4000, 8)).astype(np.float32),
        "identities": np.array([f"id{n % 7}" for n in range(4000)]),
        "cameras": np.arange(4000) % 3,
    }
    write_features(folder / "f.npz", arrays)
    settings = {**TINY, "model.arch": str(ROOT / TINY["model.arch"]), "cluster.launcher": "local", "cluster.workers": 1}
    (folder / "c.yaml").write_text(f"data: {{shards: {shards}, cache_dir: {folder}/cache}}\n")
    return folder, [f"{key}={value}" for key, value in settings.items()]


def build(files, out):
    return pack.main, ["build", "--dataset", "manifest", "--root", files / "table.csv", "--out", out]


def render(files, out):
    return pack.main, ["render", "--out", out, "--identities", "2", "--images", "2", "--cameras", "2"]


def inspect(files, out):
    return pack.main, ["inspect", files / "shards", "--sheet", out]


def evaluate_features(files, out):
    return evaluate.main, ["--features", files / "f.npz", files / "f.npz", "--out", out, "--per-query", f"{out}.csv"]


def evaluate_weights(files, out):
    return evaluate.main, ["--config", files / "c.yaml", "--weights", files / "model.safetensors", "--out", out]


def extract_file(files, out):
    return extract.main, [*evaluate_weights(files, out)[1], "--split", "query"]


def extract_folder(files, out):
    return extract.main, [*evaluate_weights(files, f"{out}.parquet")[1], "--split", "query"]


def export_file(files, out):
    return export.main, ["--weights", files / "model.safetensors", "--format", "official", "--out", out]


def draw(files, out):
    return figures.main, ["--figure", "ranked", *evaluate_weights(files, out)[1]]


def train_run(files, out):
    return train.main, ["--config", files / "c.yaml", f"run.dir={out}"]


def show_status(files, out):
    return status.main, [out]


PACKING = (build, render, inspect)
USING = (evaluate_features, evaluate_weights, extract_file, extract_folder, export_file, draw)
COMMANDS = (*PACKING, *USING, train_run, show_status)
WITH_SETTINGS = (evaluate_weights, extract_file, extract_folder, draw, train_run)


def outcome(command, way, files, folder, monkeypatch, capsys):
    """Exit code, and what was said on stderr."""
    read, settings = files
    with way(folder) as out:
        main, arguments = command(read, out)
        arguments = [*map(str, arguments), *(settings if command in WITH_SETTINGS else ())]
        monkeypatch.setattr(sys, "argv", [f"{main.__module__.split('.')[1]}.py", *arguments])
        try:
            code = cli.run(main)
        except SystemExit as stop:
            code = stop.code
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_what_the_system_refuses_is_one_line_and_exit_code_2(command, way, files, tmp_path, monkeypatch, capsys):
    code, told = outcome(command, way, files, tmp_path, monkeypatch, capsys)
    if (command, way) == (inspect, too_many_open_files) and code == 0:
        return  # it opens one file after the other
    errors = [line for line in told if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1, told
    assert len(errors[0]) < 700 and not [line for line in told if "Traceback" in line], told


@pytest.mark.parametrize("command", [*PACKING, *USING], ids=lambda command: command.__name__)
def test_a_disk_that_is_full_after_a_while_is_one_line_as_well(command, files, tmp_path, monkeypatch, capsys):
    code, told = outcome(command, little_space, files, tmp_path, monkeypatch, capsys)
    errors = [line for line in told if line.startswith("error: ")]
    assert not [line for line in told if "Traceback" in line], told
    if command in (evaluate_features, evaluate_weights, extract_file, extract_folder) and code == 0:
        return  # there was room for so little
    assert code == 2 and len(errors) == 1 and "no space left" in errors[0] and "/full/" in errors[0], told
