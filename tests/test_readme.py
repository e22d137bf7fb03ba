"""The README's commands, run as they stand there on a tiny dataset; only names of files are replaced.

One command of torchrun runs with its two processes and makes the run that the others use; elsewhere its programs run in
this process, which saves the start of another and leaves torchrun's own options to `test_pages.py`.
"""

import importlib
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cluster.settings.yaml_file import dump_config, load_config
from tests.helpers.commands import MODULE, ROOT, commands
from tests.helpers.layouts import folders_of_identities
from tests.helpers.runs import BIN, TINY, environment

README = commands(ROOT / "README.md")
GIVEN = ("configs/demo.yaml", "data/demo/shards", "runs/demo", "runs", "features.npz", "mine.csv", "photos")
"""What the README's user has, and a tiny one stands in for."""
RUN = [c for c in README if c.split()[0] in ("python", "torchrun") and any(name in shlex.split(c) for name in GIVEN)]
TRAIN = next(c for c in RUN if c.startswith("torchrun") and "launch/train.py" in c)
LEAVES = {
    "inspect": ["sheet.png"],
    "manifest": ["data/mine/shards/dataset.json"],
    "query.npz": ["query.npz"],
    "gallery.parquet": ["gallery.parquet"],
    "launch/export.py": ["clipreid.pth"],
    "launch/figures.py": ["pictures/tsne.png", "pictures/relevance.png", "pictures/ranked.png"],
}
"""Files after a command that holds the word."""


@pytest.fixture(scope="module")
def given(tiny_shards, tmp_path_factory):
    """The tiny files by the README's names. The run is what the README's own torchrun command makes."""
    folder = tmp_path_factory.mktemp("readme")
    settings = TINY | {"data.shards": tiny_shards, "run.dir": folder / "run", "stage1.epochs": 1, "stage2.epochs": 1}
    (folder / "none.yaml").write_text("{}")
    config = load_config(folder / "none.yaml", [f"{key}={value}" for key, value in settings.items()])
    (folder / "demo.yaml").write_text(dump_config(config))
    _write_features(folder / "features.npz")
    files = {name: folder / name.rpartition("/")[2] for name in GIVEN} | {
        "data/demo/shards": tiny_shards,
        "runs/demo": folder / "run",
        "runs": folder,
        "mine.csv": _write_csv(tiny_shards.parent / "images" / "image_train"),
        "photos": folders_of_identities(tiny_shards.parent / "images", folder / "photos"),
    }
    program, *words = _words(TRAIN, files)
    command = [BIN / program, "--standalone", *words]  # A port of its own: other tests run beside.
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return files


def _write_csv(images):
    names = sorted(path.name for path in images.glob("*.jpg"))
    rows = [f"{name},{name[:4]},{('train', 'query', 'gallery')[n % 3]}" for n, name in enumerate(names)]
    (images / "mine.csv").write_text("\n".join(["path,identity,split", *rows]))
    return images / "mine.csv"


def _write_features(path):
    draw = np.random.default_rng(0)
    arrays = {}
    for side, count in (("query", 10), ("gallery", 40)):
        arrays[f"{side}_features"] = draw.normal(size=(count, 8)).astype(np.float32)
        arrays[f"{side}_identities"] = np.array([f"i{n % 5}" for n in range(count)])
        arrays[f"{side}_cameras"] = draw.integers(0, 2, count) + 2 * (side == "gallery")
    np.savez(path, **arrays)


def _words(command, files):
    return [str(files.get(word, word)) for word in shlex.split(command)]


@pytest.mark.parametrize("command", RUN)
def test_the_command_works(command, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = _words(command, given)
    script = next(n for n, word in enumerate(words) if MODULE.fullmatch(word))
    main = importlib.import_module(f"launch.{MODULE.fullmatch(words[script])[1]}").main
    assert not main(words[script + 1 :])
    printed = capsys.readouterr().out.strip()
    assert printed
    if "launch/evaluate.py" in words:
        assert Path(printed.rpartition("metrics: ")[2]).is_file()
    for word, names in LEAVES.items():
        if word in words:
            assert [name for name in names if not (tmp_path / name).exists()] == []


def test_every_command_is_run_that_needs_only_the_demo_or_the_users_own_files():
    apart = [c for c in README if c not in RUN and c.split()[0] not in ("make", "ray") and "-m pytest" not in c]
    assert all("omniglot" in c or "market1501" in c for c in apart), apart
    assert len(RUN) >= 11
