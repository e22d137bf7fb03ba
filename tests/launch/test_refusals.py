"""A user's mistake with `launch/train.py`: one clear line, exit code 2, nothing started, nothing written."""

import time

import pytest

from tests.helpers.runs import config_file, free_ports, launch, overrides

LIMIT_S = 5


def refused(*arguments):
    start = time.monotonic()
    done = launch("train.py", *arguments, check=False)
    seconds = time.monotonic() - start
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines), lines
    return lines, seconds


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stage2.idenities": 4}, ("stage2.idenities", "did you mean stage2.identities")),
        ({"stage2.images_per_identity": 1}, ("stage2.images_per_identity", "greater than or equal to 2")),
        ({"cluster.workers": 3}, ("cluster.workers", "4 identities", "[1, 2, 4]")),
        ({"cluster.workers": 16}, ("cluster.workers", "[1, 2, 4]")),
        ({"data.shards": "/nowhere/shards"}, ("data.shards", "/nowhere/shards")),
        ({"stage2.identities": 64}, ("stage2.identities", "64", "8")),
        ({"model.arch": "ViT-B-61"}, ("ViT-B-61",)),
        ({"model.arch": "configs/models/none.json"}, ("configs/models/none.json",)),
        ({"model.image_size": "[4,4]"}, ("model.image_size",)),
        ({"stages": "[2]", "stage1.result": "/nowhere/stage1.safetensors"}, ("stage1.result", "/nowhere")),
        ({"run.resume": "/nowhere"}, ("run.resume", "/nowhere")),
    ],
)
def test_a_mistake_is_one_line_with_the_key_the_value_and_the_remedy(change, words, tiny_shards, tmp_path):
    changes = {key.replace(".", "__"): value for key, value in change.items()}
    settings = overrides(tiny_shards, tmp_path / "run", **changes)
    (line, *more), seconds = refused("--config", config_file(tmp_path), *settings)
    assert not more
    assert all(word in line for word in words), line
    assert seconds < 2 * LIMIT_S  # Twice what is promised: the machine that tests runs other things too.
    assert not (tmp_path / "run").exists()


def test_weights_by_tag_without_a_network_are_refused_before_workers_start(tiny_shards, tmp_path, monkeypatch):
    """One line, asked once; nothing of the workers or of tries that are repeated."""
    (port,) = free_ports(1)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    settings = {"model__arch": "ViT-B-16-quickgelu", "model__pretrained": "openai", "model__image_size": "[64,32]"}
    (line,), _ = refused("--config", config_file(tmp_path), *overrides(tiny_shards, tmp_path / "run", **settings))
    assert all(word in line for word in ("'openai'", f"127.0.0.1:{port}", "refused", "give the path of a local file"))
    assert not (tmp_path / "run").exists()


def test_an_empty_split_is_named(tiny_shards, tmp_path):
    images = tiny_shards.parent / "images" / "image_train"
    rows = [f"{image.name},{image.name[:4]},train,{n % 3}" for n, image in enumerate(sorted(images.glob("*.jpg")))]
    csv = images / "list.csv"
    csv.write_text("\n".join(["path,identity,split,camera", *rows]))
    launch("pack.py", "build", "--dataset", "manifest", "--root", csv, "--out", tmp_path / "s")
    lines, _ = refused("--config", config_file(tmp_path), *overrides(tmp_path / "s", tmp_path / "run"))
    for split, line in zip(("query", "gallery"), lines, strict=True):
        assert f"has no images in split {split}, only in train: pack the dataset with it" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--confi", "a.yaml"], "--config"),
        ([], "--config"),
        (["--config", "a.yaml", "--epochs", "3"], "unrecognized arguments: --epochs"),
        (["stage2.epochs=0", "--config", "configs/demo.yaml", "stage1.epochs=0"], "stage1.epochs"),
    ],
)
def test_a_command_that_is_not_understood_is_one_line_and_settings_go_before_or_after(arguments, words):
    lines, _ = refused(*arguments)
    assert any(words in line for line in lines), lines
    assert len(lines) == (2 if "stage2.epochs=0" in arguments else 1)


def test_a_missing_configuration_is_named(tmp_path):
    (line,), _ = refused("--config", tmp_path / "none.yaml")
    assert "none.yaml: no such file" in line
