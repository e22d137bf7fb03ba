"""inspect tells what was packed, and draws it."""

import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import pack as command
from shards.index_table import read_index_table
from shards.packing.build import build
from shards.packing.contact_sheet import CELL, GAP, TEXT, write_sheet
from shards.packing.overview import Overview, SplitOverview, Spread
from tests.helpers.layouts import make_manifest, make_vehicleid

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    table = make_manifest(
        root, train=6, tested=3, images=5, size={"width": 40, "height": 60}, camera_of=lambda n: n % 3
    )
    build("manifest", [str(table)], str(root / "out"), noun="cup", processes=1)
    return str(root / "out")


def test_the_numbers_are_those_of_the_index(packed):
    overview = Overview.read(packed)
    rows = read_index_table(packed).to_pylist()
    assert [split.name for split in overview.splits] == ["train", "query", "gallery"]
    for split in overview.splits:
        mine = [row for row in rows if row["split"] == split.name]
        assert split.images == len(mine)
        assert split.identities == len({row["identity"] for row in mine})
        assert split.images_per_camera == Counter(row["camera"] for row in mine)
        assert split.images_per_view == {-1: len(mine)}
        assert str(split.widths) == "40" and str(split.heights) == "60"
        assert split.num_bytes == (Path(packed) / f"{split.name}-000000.tar").stat().st_size


def test_the_histogram_counts_every_identity_once():
    counts = np.array([1, 2, 3, 3, 4, 7, 8, 15, 16, 300])
    spread = Spread.of(counts)
    assert str(spread) == "1 – 5 – 300"
    split = SplitOverview("train", int(counts.sum()), 1, 1, counts, {}, {}, spread, spread, spread)
    assert split.histogram() == [
        ("1", 1),
        ("2–3", 3),
        ("4–7", 2),
        ("8–15", 2),
        ("16–31", 1),
        ("32–63", 0),
        ("64–127", 0),
        ("128–255", 0),
        ("256–511", 1),
    ]


def test_the_sheet_shows_train_and_test_identities_in_rows(packed, tmp_path):
    write_sheet(packed, tmp_path / "sheet.png", identities=4)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.format == "PNG"
    assert sheet.size == (GAP + 5 * (CELL + GAP), GAP + 4 * (TEXT + CELL + TEXT + GAP))
    row = read_index_table(packed).to_pylist()[0]
    with (Path(packed) / row["shard"]).open("rb") as file:
        file.seek(row["offset"])
        first = np.asarray(Image.open(io.BytesIO(file.read(row["size"]))).convert("RGB"))
    shown = np.asarray(sheet)[GAP + TEXT + (CELL - 60) // 2 :, GAP + (CELL - 40) // 2 :][:60, :40]
    assert (shown == first).all()


def test_the_command_prints_tables_and_writes_the_sheet(packed, tmp_path):
    line = [sys.executable, str(ROOT / "launch" / "pack.py"), "inspect", packed, "--sheet", str(tmp_path / "s.png")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("noun 'cup'", "images per identity", "images per camera", "gallery", "contact sheet"):
        assert text in done.stdout
    assert "images per view" not in done.stdout
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_a_sheet_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, capsys):
    for place, fault in ((tmp_path / "none" / "s.png", "no such folder"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit) as stop:
            command.main(["inspect", "nowhere", "--sheet", str(place)])
        assert stop.value.code == 2
        assert f"error: --sheet {place}: {fault}" in capsys.readouterr().err


def test_a_dataset_without_cameras_can_be_inspected(tmp_path):
    build("vehicleid", [str(make_vehicleid(tmp_path / "v"))], str(tmp_path / "out"), processes=1)
    overview = Overview.read(str(tmp_path / "out"))
    assert [split.images_per_camera for split in overview.splits] == [{-1: 4}, {-1: 6}]
    write_sheet(str(tmp_path / "out"), tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width == GAP + 2 * (CELL + GAP)
