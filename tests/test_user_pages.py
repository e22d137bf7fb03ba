"""The Python of the pages, and the commands of docs/own-data.md, run as they stand there on a tiny run; only names of
files are replaced."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from clipreid.weights.file import load_state
from clipreid.weights.official import save_official
from cluster.settings.yaml_file import dump_config, load_config
from tests.helpers.commands import ROOT, commands
from tests.helpers.layouts import folders_of_identities
from tests.helpers.runs import config_file, environment, overrides, train

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def given(tiny_shards, tmp_path_factory):
    """A run, the authors' checkpoint and photos, by the names that the pages have for them."""
    from clipreid.weights.card import read_card

    folder = tmp_path_factory.mktemp("pages")
    settings = overrides(tiny_shards, folder / "run", cluster__launcher="local", stage1__epochs=1, stage2__epochs=1)
    train(config_file(folder), *settings)
    card = read_card(folder / "run")
    save_official(folder / "official.pth", load_state(folder / "run"), card.spec)
    (folder / "official.yaml").write_text(dump_config(load_config(config_file(folder), settings)))
    return {
        "runs/demo": folder / "run",
        "photos": tiny_shards.parent / "images" / "image_query",
        "ViT-B-16_60.pth": folder / "official.pth",
        "configs/market1501_vit.yaml": folder / "official.yaml",
    }


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_of_a_page_runs_from_top_to_bottom(page, given):
    blocks = BLOCK.findall((ROOT / page).read_text())
    code = "\n".join(blocks)
    for name, path in given.items():
        code = code.replace(f'"{name}"', repr(str(path)))
    assert "clipreid.load(" in code and "runs/" not in code
    names = {}
    exec(compile(code, page, "exec"), names)
    assert names["features"].dtype == np.float32 and names["nearest"].shape[0] >= 2
    for line in (line for block in blocks for line in block.splitlines() if line.startswith("reid.encode(")):
        assert len(eval(_replaced(line, given), names)) in (1, len(names["paths"])), line


def _replaced(line, given):
    for name, path in given.items():
        line = line.replace(f'"{name}"', repr(str(path)))
    return line


def test_the_library_is_the_readmes_second_section_in_five_lines():
    sections = (ROOT / "README.md").read_text().split("\n## ")
    code = BLOCK.findall(sections[2])[0]
    assert len(code.splitlines()) == 5 and "import clipreid" in code


OWN = commands(ROOT / "docs" / "own-data.md")
MINE = [command for command in OWN if "photos" in command or "data/mine/shards" in command or "runs/mine" in command]
SHORT = ["stage1.epochs=1", "stage2.epochs=1"]


@pytest.fixture(scope="module")
def empty_folder(given, tiny_shards, tmp_path_factory):
    """A user's folder: photos, a trained run by the page's name, and the project's files."""
    folder = tmp_path_factory.mktemp("own")
    folders_of_identities(tiny_shards.parent / "images", folder / "photos")
    (folder / "runs").mkdir()
    (folder / "runs" / "demo").symlink_to(given["runs/demo"])
    (folder / "configs").mkdir()
    (folder / "configs" / "finetune.yaml").symlink_to(ROOT / "configs" / "finetune.yaml")
    (folder / "launch").symlink_to(ROOT / "launch")
    return folder


def test_the_commands_for_own_images_work_one_after_the_other(empty_folder):
    kept = [command for command in MINE if "ViT-B-16_60" not in command]
    assert len(kept) >= 6
    for command in kept:
        words = [sys.executable, *shlex.split(command)[1:], *(SHORT if "train.py" in command else [])]
        done = subprocess.run(words, cwd=empty_folder, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, command + done.stderr[-2000:]
        if "--dry-run" in command:
            assert not (empty_folder / "data").exists() and "the rest is the gallery" in done.stdout
        if "train.py" in command:
            assert (
                "begins anew: classifiers and prompts of 11 identities" in done.stdout
                and "photos: train" in done.stdout
            )
    assert (empty_folder / "sheet.png").is_file() and (empty_folder / "runs" / "mine" / "evaluation.json").is_file()
