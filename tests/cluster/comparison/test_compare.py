"""compare.py: the figures of evaluate.py with intervals, what differs, which queries changed, and a page of its own."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipreid.errors import ModelError
from cluster.comparison.compare_runs import compare_runs
from cluster.comparison.comparison import differing, most_changed, short_names
from cluster.evaluation.metrics import show_nothing
from launch import compare, evaluate
from tests.helpers.made_runs import made_run
from tests.helpers.shards import write_index, write_shards

SPLITS = {
    "train": {f"t{n}": 4 for n in range(4)},
    "query": {f"i{n}": [0, 1] for n in range(12)},
    "gallery": {f"i{n}": [0, 1, 2, 2] for n in range(12)} | {"": [0, 1]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three folders of runs on one dataset: the last is the second again, with another setting."""
    folder = tmp_path_factory.mktemp("compared")
    shards = write_shards(folder / "shards", SPLITS)
    made = {"a": (0, {}), "b<x": (1, {}), "d": (1, {"stage2__margin": 0.7})}
    return [made_run(folder / name, shards, seed, **changes) for name, (seed, changes) in made.items()]


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """compare.py's JSON and page, and what it printed."""
    folder = tmp_path_factory.mktemp("written")
    arguments = ["--by", "query", "--html", str(folder / "page.html"), "--out", str(folder / "figures.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        compare.main([*runs, *arguments, "--resamples", "200"])
    return json.loads((folder / "figures.json").read_text()), (folder / "page.html").read_text()


@pytest.fixture(scope="module")
def results(runs):
    return compare_runs(runs, None, 50, 0, 10, show_nothing)


def test_the_figures_are_those_of_evaluate_py_within_their_intervals(runs, compared, tmp_path):
    for folder, run in zip(runs, compared[0]["runs"], strict=True):
        evaluate.main(["--weights", folder, "--out", str(tmp_path / "metrics.json")])
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert list(run["figures"]) == ["mAP", "mINP", "R1", "R5", "R10"]
        for name, figure in run["figures"].items():
            assert figure["value"] == pytest.approx(metrics[name], abs=1e-12)
            assert figure["low"] <= figure["value"] <= figure["high"]


def test_differences_are_from_the_first_run(compared):
    first, *others = compared[0]["runs"]
    assert "differences" not in first
    for run in others:
        for name, difference in run["differences"].items():
            assert difference["value"] == pytest.approx(run["figures"][name]["value"] - first["figures"][name]["value"])
    assert others[0]["differences"] == others[1]["differences"]  # the same weights, whatever their settings


def test_a_run_does_not_differ_from_itself(runs):
    twice = compare_runs([runs[0], runs[0]], None, 50, 0, 0, show_nothing)
    for difference in twice.comparison.differences[0].values():
        assert difference.value == difference.low == difference.high == 0
    assert twice.comparison.settings == {} and twice.changes(10)[0][2] == []


def test_the_settings_that_differ_are_listed_and_no_other(compared):
    assert compared[0]["settings"] == {"run.seed": [0, 1, 1], "stage2.margin": [0.3, 0.3, 0.7]}


def test_a_setting_that_another_version_does_not_have_differs():
    assert differing([{"a": 1, "b": None}, {"a": 1}]) == {"b": [None, "-"]}


def test_the_queries_that_changed_most_come_first(results):
    first, other, _ = results.results
    changes = most_changed(first, other, 5)
    plain = sorted(range(len(first.AP)), key=lambda number: -abs(first.AP[number] - other.AP[number]))[:5]
    assert [change.number for change in changes] == plain
    assert [change.AP for change in changes] == [(first.AP[n], other.AP[n]) for n in plain]


class Page(HTMLParser):
    """What a page asks for, and the classes of its figures."""

    def __init__(self, text):
        super().__init__()
        self.asked, self.tags, self.figures = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        facts = dict(attributes)
        self.tags.append(tag)
        self.asked += [facts[name] for name in ("src", "href", "srcset", "data") if name in facts]
        self.figures += [facts["class"]] if tag == "figure" else []


def test_the_page_holds_its_pictures_and_asks_for_nothing(compared, results):
    text = compared[1]
    page = Page(text)
    assert page.asked and all(link.startswith("data:image/jpeg;base64,") for link in page.asked)
    assert not {"script", "link", "iframe", "object"} & set(page.tags) and not re.search(r"url\(|@import", text)
    changes = results.changes(10)
    assert page.tags.count("section") == sum(len(each) for _, _, each in changes)
    shown = [(r, change.number) for _, each, some in changes for change in some for r in (results.results[0], each)]
    right = sum(
        int(result.gallery.identity_codes[row] == result.identities[number])
        for result, number in shown
        for row in result.nearest[number]
        if row >= 0
    )
    assert page.figures.count("right") == right and text.count("✓ 0") + text.count("✓ 1") == right


def test_names_of_runs_and_images_are_text_on_the_page(compared):
    assert "b&lt;x" in compared[1] and "<x" not in compared[1]


def test_a_table_names_runs_settings_and_queries(runs, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    compare.main([*runs[:2], "--by", "query", "--resamples", "50"])
    printed = capsys.readouterr().out
    assert "run.seed" in printed and "b<x" in printed and "rank of the first match" in printed
    assert "24 queries of 12 identities; in brackets 95 % intervals, from 50 resamples" in printed


def test_of_vehicleid_the_figures_are_the_means_over_the_draws(tmp_path):
    folder = tmp_path / "shards"
    write_shards(folder, {"train": SPLITS["train"], "test": {f"i{n}": 3 for n in range(8)}})
    table = pq.read_table(folder / "index.parquet")
    lists = ["800" if split == "test" else "" for split in table["split"].to_pylist()]
    place = table.schema.get_field_index("lists")
    table = table.set_column(place, table.schema.field("lists"), pa.array(lists, table.schema.field("lists").type))
    counts = json.loads((folder / "dataset.json").read_text())["splits"]
    shards = write_index(folder, None, counts, table=table)
    made = [made_run(tmp_path / str(seed), shards, seed, eval__draws=3) for seed in (0, 1)]
    found = compare_runs(made, None, 50, 0, 3, show_nothing)
    evaluate.main(["--weights", made[0], "--out", str(tmp_path / "metrics.json")])
    metrics = json.loads((tmp_path / "metrics.json").read_text())["small"]
    assert list(found.comparison.figures[0]) == ["mAP", "R1", "R5"]
    for name, figure in found.comparison.figures[0].items():
        assert figure.value == pytest.approx(metrics[name]["mean"])
    first, other = found.results
    assert np.array_equal(first.rows, other.rows)  # the draws of the first run's seed
    assert not (first.nearest == first.rows[:, None]).any()


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main([runs[0]])
    assert "name two or more" in capsys.readouterr().err
    with pytest.raises(ModelError, match="holds no model.safetensors"):
        compare.main([runs[0], str(tmp_path)])
    with pytest.raises(SystemExit):
        compare.main([*runs, "--html", str(tmp_path / "x"), "--out", str(tmp_path / "x")])
    assert "is the file of --html too" in capsys.readouterr().err


def test_runs_are_called_by_the_last_part_of_their_paths_where_that_tells_them_apart():
    assert short_names(["runs/a/", "other/b"]) == ["a", "b"]
    assert short_names(["x/a", "y/a"]) == ["x/a", "y/a"]
