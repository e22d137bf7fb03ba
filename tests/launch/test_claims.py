"""The study of the paper's claims: what it plans, that it goes on where it stopped, and what it makes of the runs."""

import csv
import json

import numpy as np
import pytest

from clipreid.model.arch import check_arch
from cluster.errors import ConfigError
from cluster.settings.yaml_file import load_config
from launch.claims import main
from launch.small_clip.training import caption_vocabulary, new_clip
from launch.small_clip.weights import write_clip
from launch.study import runner
from launch.study.comparison import compare, query_ap
from launch.study.plan import DESCRIPTORS, TABLES, TWO_STAGE, VARIANTS, planned_runs, slug
from launch.study.report import as_text
from tests.helpers.runs import TINY

CONFIG = "configs/claims.yaml"


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_a_setting_that_differs_from_the_published_one(variant):
    overrides = [f"{key}={value}" for key, value in VARIANTS[variant].items()]
    config = load_config(CONFIG, overrides)
    assert (config == load_config(CONFIG)) == (variant == TWO_STAGE)
    assert config.model.pretrained and config.stage2.epochs == load_config(CONFIG).stage2.epochs


def test_descriptors_are_settings_too():
    assert {load_config(CONFIG, [f"eval.descriptor={text}"]).eval.descriptor for text in DESCRIPTORS.values()} == {
        ("img",),
        ("proj",),
        ("pre", "img", "proj"),
    }


def test_a_row_that_stands_in_several_tables_is_run_once():
    runs = planned_runs(TABLES)
    assert len({run.folder for run in runs}) == len(runs)
    seeds = {variant: sorted(run.seed for run in runs if run.variant == variant) for variant in VARIANTS}
    five = {"baseline", "one stage", TWO_STAGE}
    assert seeds == {variant: list(range(5 if variant in five else 3)) for variant in VARIANTS}
    assert {run.descriptors for run in runs if run.variant == TWO_STAGE} == {tuple(sorted(DESCRIPTORS))}
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)  # whole tables early, of few seeds


def test_fewer_seeds_and_tables_are_fewer_runs():
    table = [table for table in TABLES if table.number == "10"]
    assert {(run.variant, run.seed) for run in planned_runs(table, 1)} == {(TWO_STAGE, 0), ("M = 1", 0), ("M = 8", 0)}


def test_names_of_folders_are_plain():
    assert len({slug(name) for name in (*VARIANTS, *DESCRIPTORS)}) == len(VARIANTS) + len(DESCRIPTORS)
    assert slug("i2tce + t2i") == "i2tce-t2i" and slug("M = 8") == "M-8"


def test_a_difference_that_all_queries_share_is_sure_and_none_is_not():
    rng = np.random.default_rng(0)
    identity_of = {str(n): str(n // 2) for n in range(40)}
    plain = [{key: float(rng.uniform(0.2, 0.8)) for key in identity_of} for _ in range(3)]
    better = [{key: value + 0.1 for key, value in run.items()} for run in plain]
    less = compare(better, plain, identity_of)
    assert (less.value, less.low, less.high) == pytest.approx((0.1, 0.1, 0.1))
    same = compare(plain, plain, identity_of)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_seeds_are_averaged_before_identities_are_drawn():
    """Two seeds that differ by noise of opposite sign: what is left is the difference."""
    base = {str(n): 0.5 for n in range(20)}
    noise = dict(zip(base, np.random.default_rng(2).normal(0, 0.2, 20), strict=True))
    runs = [{key: 0.6 + sign * noise[key] for key in base} for sign in (1, -1)]
    less = compare(runs, [base, base], {key: key for key in base})
    assert (less.low, less.high) == pytest.approx((0.1, 0.1))


def test_queries_without_a_match_are_left_out(tmp_path):
    path = tmp_path / "queries.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("query", "AP"), ("a1", 0.2), ("b1", 1.0), ("c1", "")])
    assert query_ap(path) == {"a1": 0.2, "b1": 1.0}


def test_the_table_says_mean_spread_and_what_is_not_told_apart():
    rows = [
        {"name": "baseline", "mAP": [0.5, 0.6], "R1": [0.7, 0.7]}
        | {"less_published": {"value": -0.1, "low": -0.15, "high": -0.05, "same_sign": 1.0}},
        {"name": "one stage", "mAP": [0.5], "R1": [0.7]}
        | {"less_published": {"value": 0.01, "low": -0.02, "high": 0.04, "same_sign": 0.7}},
        {"name": "two stages", "mAP": [0.65, 0.65], "R1": [0.8, 0.8]},
    ]
    text = as_text([{"table": "4, 5", "title": "Training", "seeds": 2, "rows": rows}]).splitlines()
    assert text[2] == "| 4, 5: Training (2 seeds) | baseline | 55.0 ± 7.1 | 70.0 ± 0.0 | -10.0 (-15.0 to -5.0) |"
    assert text[3] == "|  | one stage | 50.0 | 70.0 | +1.0 (-2.0 to +4.0, not told apart) |"
    assert text[4] == "|  | two stages | 65.0 ± 0.0 | 80.0 ± 0.0 |  |"


@pytest.fixture(scope="module")
def study(tiny_shards, tmp_path_factory):
    """A study of one table and one seed on tiny models, and the arguments that made it."""
    folder = tmp_path_factory.mktemp("study")
    arch = check_arch(TINY["model.arch"])
    words = caption_vocabulary()
    write_clip(folder / "clip.safetensors", new_clip(arch, words, 1).state_dict(), words, arch, {"seed": 1})
    settings = TINY | {"model.pretrained": folder / "clip.safetensors", "cluster.workers": 1, "stage2.milestones": "2"}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    places = ["--data", str(tiny_shards.parent), "--out", str(folder / "runs")]
    arguments = ["--tables", "8", "--seeds", "1", "--jobs", "1", *places, *overrides]
    assert not main(arguments)
    return folder / "runs", arguments


@pytest.mark.slow
def test_a_study_leaves_usual_run_folders_and_one_table(study):
    folder, _ = study
    for variant in ("two-stages", "average-features"):
        run = folder / variant / "seed-0"
        assert json.loads((run / "status.json").read_text())["phase"] == "finished"
        assert (run / "model.safetensors").exists()
        trained, evaluated = (json.loads((run / name).read_text()) for name in ("metrics.json", "queries.json"))
        assert trained["mAP"] == evaluated["mAP"]
    (table,) = json.loads((folder / "claims.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["instance features", "average features"]
    assert table["rows"][1]["less_published"].keys() == {"value", "low", "high", "same_sign"}
    assert "average features" in (folder / "claims.md").read_text()


@pytest.mark.slow
def test_a_repeated_study_runs_nothing_again(study, monkeypatch):
    folder, arguments = study
    before = (folder / "claims.md").read_text()
    monkeypatch.setattr(runner.subprocess, "run", lambda *_, **__: pytest.fail("a command was called"))
    assert not main(arguments)
    assert (folder / "claims.md").read_text() == before


def test_a_command_that_fails_is_named_with_its_last_line_and_its_log(tmp_path):
    log = tmp_path / "logs" / "run.log"
    with pytest.raises(
        ConfigError, match=r"train\.py ended with 2 \(error: .*none\.yaml.*\); see .*run\.log; the same"
    ):
        runner.call(["train.py", "--config", tmp_path / "none.yaml"], log)
    assert "none.yaml" in log.read_text()


def test_a_folder_of_a_study_with_other_settings_is_refused(tmp_path):
    def claim(seed, *overrides):
        runner.claim_folder(runner.Study(tmp_path / "out", tmp_path / "shards", overrides), seed)

    claim(100, "stage2.lr=1e-4")
    claim(100, "stage2.lr=1e-4")
    for seed, override in ((100, "stage2.lr=2e-4"), (101, "stage2.lr=1e-4")):
        with pytest.raises(ConfigError, match="give another --out"):
            claim(seed, override)


def test_a_mistyped_setting_is_refused_before_anything_is_rendered(tmp_path):
    with pytest.raises(ConfigError, match="did you mean stage2.epochs"):
        main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "stage2.epoch=3"])
    assert not list(tmp_path.iterdir())
