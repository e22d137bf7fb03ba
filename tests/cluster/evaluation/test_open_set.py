"""evaluate.py --open-set: beside the usual figures, the same from weights and features; and what the card keeps."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from clipreid.weights.card import read_card
from clipreid.weights.sealed import check_file
from launch import evaluate, extract
from tests.helpers.made_runs import made_run
from tests.helpers.shards import write_shards

SPLITS = {
    "train": {f"t{n}": 4 for n in range(4)},
    "query": {f"i{n}": [0, 1] for n in range(20)},
    "gallery": {f"i{n}": [0, 1, 2, 2] for n in range(20)} | {"": [0, 1]},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open")
    return made_run(folder / "run", write_shards(folder / "shards", SPLITS))


def evaluated(*arguments, out):
    evaluate.main([*map(str, arguments), "--out", str(out)])
    return json.loads(out.read_text())


def test_open_set_figures_come_beside_the_usual_ones_and_from_features_alike(run, tmp_path, capsys):
    usual = evaluated("--weights", run, out=tmp_path / "usual.json")
    found = evaluated("--weights", run, "--open-set", "--fpir", 0.1, out=tmp_path / "found.json")
    opened = found.pop("open_set")
    assert found == usual and opened["threshold"]["wanted"] == 0.1
    assert [each["identities"] for each in opened["by_gallery"]] == [2, 3, 5, 10]
    assert opened["mated_searches"] == opened["non_mated_searches"] == 20
    assert opened["FNIR@FPIR"] == opened["by_gallery"][-1]["FNIR@FPIR"]
    printed = capsys.readouterr().out
    assert "threshold for FPIR 0.1: distance" in printed and "calibration error" in printed
    for split in ("query", "gallery"):
        extract.main(["--weights", run, "--split", split, "--out", str(tmp_path / f"{split}.npz")])
    files = tmp_path / "query.npz", tmp_path / "gallery.npz"
    features = evaluated("--features", *files, "--open-set", "--fpir", 0.1, out=tmp_path / "features.json")
    again = features["open_set"]
    assert again["by_gallery"] == opened["by_gallery"] and again["threshold"] == opened["threshold"]
    other = evaluated("--features", *files, "--open-set", "--seed", 5, out=tmp_path / "other.json")["open_set"]
    assert other["threshold"]["distance"] != opened["threshold"]["distance"] and other["threshold"]["wanted"] == 0.01


def test_the_card_keeps_the_decision_and_the_tensors_stay_as_they_are(run, tmp_path, capsys):
    place = Path(run) / "model.safetensors"
    before, tensors = read_card(place), load_file(place)
    assert before.decision == {}
    found = evaluated("--weights", run, "--open-set", "--keep", out=tmp_path / "found.json")["open_set"]
    assert f"card: {place}" in capsys.readouterr().out
    card = read_card(place)
    assert card.decision["threshold"] == found["threshold"]
    assert card.decision["same_identity"] == found["same_identity"]
    assert card.decision["measured"]["rule"] == "camera"
    assert card.decision["measured"]["gallery"] == {"identities": 10, "images": 40}
    assert (card.spec, card.training, card.descriptor) == (before.spec, before.training, before.descriptor)
    with place.open("rb") as file:
        assert check_file(file, place.stat().st_size, str(place)).hashes
    for name, tensor in load_file(place).items():
        assert np.array_equal(tensor, tensors[name])
    again = evaluated("--weights", run, "--open-set", out=tmp_path / "again.json")["open_set"]
    assert again == found


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--weights", "runs/demo", "--keep"], "--keep: belongs to --open-set"),
        (["--weights", "runs/demo", "--fpir", "0.1"], "--fpir: belongs to --open-set"),
        (["--weights", "runs/demo", "--open-set", "--fpir", "2"], "'2' is not a number between 0 and 1"),
        (["--features", "a.npz", "--open-set", "--keep"], "features have no card"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, reason, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    assert reason in capsys.readouterr().err
