"""figures.py: the three pictures of a finished run, and what they say."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from PIL import Image
from safetensors.torch import load_file

from clipreid.weights.card import find_card
from clipreid.weights.file import load_models, read_card
from clipreid.weights.initial import build_models
from cluster.errors import ConfigError
from cluster.evaluation.figures import RIGHT, WRONG, Subject, ranked_lists, tsne
from cluster.settings.yaml_file import load_config
from launch import figures
from launch.cli import progress_bar
from shards.loading.index import ShardIndex
from tests.helpers.runs import config_file, overrides, train
from tests.helpers.shards import write_shards


@pytest.fixture(scope="module")
def run(tiny_shards, tmp_path_factory):
    """Folder of a finished run."""
    folder = tmp_path_factory.mktemp("figures")
    settings = overrides(tiny_shards, folder / "run", cluster__launcher="local", stage1__epochs=1, stage2__epochs=1)
    train(config_file(folder), *settings)
    return folder / "run"


def subject_of(run, *settings):
    config, path = load_config(str(run / "config.yaml"), list(settings)), run / "model.safetensors"
    return Subject.of(config, path, find_card(path), ShardIndex.open(config.data.shards), progress_bar)


def test_all_figures_are_drawn(run, tmp_path, capsys):
    figures.main(["--config", str(run / "config.yaml"), "--weights", str(run), "--out", str(tmp_path / "pictures")])
    files = [tmp_path / "pictures" / f"{name}.png" for name in figures.NAMES]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    for file in files:
        with Image.open(file) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10


@pytest.fixture(scope="module")
def stage1_run(tiny_shards, tmp_path_factory):
    """Folder of a run with stage 1 alone, its model and metrics, and the command that repeats it."""
    folder = tmp_path_factory.mktemp("stage1")
    settings = overrides(tiny_shards, folder / "run", cluster__launcher="local", stage1__epochs=1, stages="[1]")
    command = config_file(folder), *settings
    train(*command)
    return folder / "run", command


def test_stage_1_alone_leaves_the_encoder_as_it_began_with_the_prompts(stage1_run):
    """Also where the run was killed between its last checkpoint and its end; nothing is measured."""
    run, command = stage1_run
    written = (run / "model.safetensors").read_bytes()
    model, _, tables = load_models(run)
    spec = read_card(run).spec
    began = build_models(spec, None, seed=0)[0].image_encoder.state_dict()
    assert all(torch.equal(value, began[name]) for name, value in model.image_encoder.state_dict().items())
    assert torch.equal(tables.tokens.block, load_file(run / "stage1.safetensors")["tokens"])
    assert not (run / "metrics.json").exists()
    for name in ("model.safetensors", "stage1.safetensors", "status.json"):
        (run / name).unlink()
    train(*command)
    assert (run / "model.safetensors").read_bytes() == written
    assert "finished before" in train(*command).stdout


def test_figures_are_drawn_after_stage_1_alone(stage1_run, tmp_path):
    run, out = stage1_run[0], tmp_path / "pictures"
    figures.main(["--config", str(run / "config.yaml"), "--weights", str(run), "--out", str(out)])
    assert {path.name for path in out.iterdir()} == {f"{name}.png" for name in figures.NAMES}
    assert len(tsne(subject_of(run)).axes[0].collections) == 2


def test_figures_of_training_images_need_no_query(stage1_run, tmp_path):
    write_shards(tmp_path / "train", {"train": {f"t{n}": 4 for n in range(8)}})
    run, out = stage1_run[0], tmp_path / "pictures"
    settings = [f"data.shards={tmp_path / 'train'}", "--config", str(run / "config.yaml"), "--weights", str(run)]
    figures.main([*settings, "--out", str(out), "--figure", "tsne", "relevance"])
    assert {path.name for path in out.iterdir()} == {"tsne.png", "relevance.png"}
    with pytest.raises(ConfigError, match="has no images in split query"):
        figures.main([*settings, "--out", str(out), "--figure", "ranked"])


def test_frames_of_the_ranked_lists_tell_right_from_wrong(run):
    """Colours of the frames against a sort of all distances of one query after the other."""
    subject = subject_of(run)
    query, gallery = (
        subject.inference.extract_split(subject.index, name, progress_bar) for name in ("query", "gallery")
    )
    figure = ranked_lists(subject)
    lines = len(figure.axes) // 11
    for line in range(lines):
        row = line * len(query["keys"]) // lines
        distances = ((query["features"][row].astype(float) - gallery["features"]) ** 2).sum(1)
        right = gallery["identities"] == query["identities"][row]
        own_camera = right & (gallery["cameras"] == query["cameras"][row])
        order = [place for place in np.argsort(distances, kind="stable") if not own_camera[place]][:10]
        frames = [axes.spines["left"] for axes in figure.axes[line * 11 + 1 : line * 11 + 11]]
        found = [frame.get_edgecolor() for frame in frames]
        assert [to_rgba(RIGHT if right[place] else WRONG) for place in order] == found
        assert not figure.axes[line * 11].spines["left"].get_visible()


def test_text_features_appear_only_where_prompts_were_learned(run):
    with_texts, without = (
        tsne(subject_of(run)),
        tsne(subject_of(run, "method=baseline", "stages=[2]", "stage2.text_loss=none")),
    )
    identities = subject_of(run).train.num_identities
    images = len(subject_of(run).train)
    assert [len(part.get_offsets()) for part in with_texts.axes[0].collections] == [images, min(identities, 10)]
    assert [len(part.get_offsets()) for part in without.axes[0].collections] == [images]


def test_the_folder_for_the_pictures_may_not_be_a_file(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        figures.main(["--config", str(run / "config.yaml"), "--weights", str(run), "--out", str(tmp_path / "file")])
    assert "is a file; name a folder" in capsys.readouterr().err
