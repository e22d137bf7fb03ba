"""Benchmarks: each runs in a tiny form and gives the figures it promises."""

import json
from pathlib import Path

import pytest

from clipreid.retrieval.metrics import retrieve
from clipreid.weights.initial import build_models
from cluster.errors import ConfigError
from launch.bench import main, names
from launch.benchmarks import evaluate, loader, pack, rerank, stage1, stage2
from tests.helpers.runs import launch
from tests.helpers.settings import model_spec
from tests.helpers.tolerances import within

TINY = "configs/models/tiny_vit.json"


def test_stage1_compares_equal_losses_of_both_steps():
    result = stage1.run(["--arch", TINY, "--batch", "8", "--identities", "8", "--rounds", "1", "--device", "cpu"])
    assert [(c["identities"], c["images_per_identity"]) for c in result["cases"]] == [(8, 1), (2, 4)]
    for case in result["cases"]:
        within(case["relative_loss_difference"], 1e-5)
        assert case["ratio"] == pytest.approx(case["samples_per_s"] / case["plain_samples_per_s"], rel=0.01)


def test_stage2_gives_speed_flops_share_and_memory_of_each_loop():
    options = ["--cases", f"{TINY}:32x16", "--batch", "8", "--steps", "1", "--modes", "eager", "--device", "cpu"]
    result = stage2.run(options)
    assert [row["mode"] for row in result["rows"]] == ["plain", "eager"]
    assert "no GPU" in result["note"]
    for row in result["rows"]:
        assert min(row[k] for k in ("images_per_s", "model_tflops", "share_of_peak", "peak_memory_bytes")) > 0
        assert row["share_of_peak"] == pytest.approx(row["model_tflops"] / result["matmul_peak_tflops"], rel=0.01)
    assert result["rows"][0]["times_plain"] == 1


def test_stage2_counts_the_products_of_a_vit_that_its_sizes_say():
    spec = model_spec(TINY, image_size=(32, 32), identities=10)
    model, _, tables = build_models(spec)
    width, hidden, tokens, images, pixels, projected = 32, 64, 17, 3, 3 * 64, 16
    per_token = 4 * width * width + 2 * width * hidden
    whole = tokens * per_token + 2 * tokens * tokens * width
    last = (2 * tokens + 2) * width * width + 2 * width * hidden + 2 * tokens * width  # one query
    heads = width * projected + 10 * (width + projected)
    embedding = (tokens - 1) * pixels * width
    # Each product is done once forward and twice backward, but no gradient goes to the pixels.
    expected = 2 * images * (3 * (whole + last + heads) + 2 * embedding)
    assert stage2.training_flops(model, tables, (images, 3, 32, 32)) == expected


def test_checkpoint_prints_what_training_waits_for_as_one_json_object():
    done = launch("bench.py", "checkpoint", "--arch", TINY, "--image-size", "32x32", "--batch", "8", "--rounds", "1")
    result = json.loads(done.stdout)
    keys = ("state_bytes", "step_ms", "stalled_ms", "stalled_share_of_step", "step_beside_write_ms", "write_ms")
    assert result["bench"] == "checkpoint" and min(result[key] for key in keys) > 0


def test_rerank_gives_the_figures_of_whole_matrices():
    sizes = ["--queries", "60", "--gallery", "300", "--identities", "40", "--cameras", "4", "--width", "32"]
    result = rerank.run([*sizes, "--settings", "8,3,0.3", "--plain", "--device", "cpu"])
    ours, plain = result["rerank"], result["plain"]
    assert ours["metrics"] == pytest.approx(plain["metrics"]) and result["equal_to_plain"]
    assert ours["metrics"]["mAP"] != result["metrics"]["mAP"]
    assert min(ours["seconds"], result["product_s"], result["times_product"]) > 0
    assert min(ours["memory_above_features_mb"], plain["memory_above_features_mb"]) >= 0


def test_evaluate_gives_time_and_memory_and_finds_a_sample_that_is_wrong(monkeypatch):
    sizes = ["--queries", "60", "--gallery", "1500", "--identities", "40", "--width", "32", "--rounds", "1"]
    result = evaluate.run([*sizes, "--sample", "60", "--device", "cpu"])
    assert result["sample_equals_plain"] and result["sample"] == 60 and 0 < result["metrics"]["mAP"] < 1
    assert min(result[key] for key in ("seconds", "product_s", "times_product", "peak_memory_mb")) > 0
    assert result["memory_above_features_mb"] >= 0
    monkeypatch.setattr(evaluate, "retrieve", lambda *sides, rule: retrieve(*sides, rule="none"))
    assert not evaluate.run([*sizes, "--device", "cpu"])["sample_equals_plain"]


def test_pack_gives_time_and_memory_and_samples_the_dataset_it_packed():
    result = pack.run(["--images", "16", "--processes", "1"])  # too few for VehicleID's share of training identities
    for command in ("build", "build_again", "verify"):
        assert result[command]["peak_rss_mb"] > 0
    assert result["index_and_sampler"]["index_images"] == 16
    assert result["index_and_sampler"]["plan_epoch_s"]["identity"] >= 0
    assert result["plain_tarfile_loop"]["images_per_s"] > 0


def test_loader_measures_all_ways_cold_while_nothing_keeps_the_shards_mapped(monkeypatch):
    mapped = []
    forget = loader.forget

    def forget_and_look(files):
        mapped.append(".tar" in Path("/proc/self/maps").read_text())
        forget(files)

    def in_this_process(*dataset_and_workers):
        return loader.usual(*dataset_and_workers[:-1], 0)

    monkeypatch.setattr(loader, "forget", forget_and_look)
    monkeypatch.setitem(loader.WAYS, "a", in_this_process)  # its processes take seconds to start
    result = loader.run(["--cases", "20x30:16x24", "--identities", "16", "--rounds", "1"])
    (case,) = result["cases"]
    for kind in ("one_core", "two_workers", "cold"):
        assert min(case[kind].values()) > 0
    assert mapped == [False] * 6  # three ways, a first round and a counted one


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["rerank", "--settings", "20"],
        ["stage1", "--batch", "5"],
        ["pack", "--images", "3"],
        ["stage2", "--cases", "vit"],
        ["stage1", "--rounds", "0"],
        ["stage2", "--steps", "0"],
        ["checkpoint", "--rounds", "0"],
    ],
)
def test_a_mistake_is_refused_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["stage1", "stage2", "rerank", "evaluate"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match="--device cuda:99: there is no such device here; use cpu"):
        main([name, "--device", "cuda:99"])


def test_the_promised_benchmarks_are_there():
    promised = ["checkpoint", "evaluate", "loader", "pack", "rerank", "sampler", "stage1", "stage2"]
    assert names() == promised
