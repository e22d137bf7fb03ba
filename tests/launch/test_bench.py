"""Benchmarks: each runs in a tiny form and gives the figures it promises."""

import json
import subprocess
from pathlib import Path

import pytest

from clipreid.retrieval.metrics import retrieve
from clipreid.weights.initial import build_models
from cluster.errors import ConfigError
from launch.bench import main, names
from launch.benchmarks import check, cluster, evaluate, feed, loader, pack, rerank, scale, stage1, stage2
from launch.measure import loops
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


def test_stage2_names_the_kernels_of_a_step_and_why_a_loop_does_not_run_and_keeps_its_rows(tmp_path, monkeypatch):
    class Broken(loops.OurLoop):
        def prepare(self):
            raise RuntimeError("no compiler\nhere")

    monkeypatch.setitem(loops.LOOPS, "compiled", Broken)
    options = ["--cases", f"{TINY}:32x16", "--batch", "8", "--steps", "1", "--modes", "compiled", "eager"]
    out = tmp_path / "stage2.json"
    result = stage2.run([*options, "--kernels", "3", "--device", "cpu", "--out", str(out)])
    plain, broken, eager = result["rows"]
    assert broken["error"] == "RuntimeError: no compiler" and "images_per_s" not in broken
    assert len(eager["kernels"]["rows"]) == 3 and "kernels" not in plain
    assert eager["kernels"]["rows"][0]["ms"] >= eager["kernels"]["rows"][1]["ms"] > 0
    assert json.loads(out.read_text()) == result


def test_feed_gives_what_the_loader_leaves_of_training_and_of_extraction():
    sizes = ["--arch", TINY, "--image-size", "32x16", "--jpeg", "20x30", "--identities", "4", "--loaders", "0"]
    result = feed.run([*sizes, "--batch", "8", "--extract-batch", "16", "--steps", "2", "--device", "cpu"])
    training, extraction = result["rows"]
    assert (training["what"], extraction["what"]) == ("training", "extraction")
    for row in result["rows"]:
        ratio = row["fed_images_per_s"] / row["ready_images_per_s"]
        assert row["fed_over_ready"] == pytest.approx(ratio, abs=0.01)
    assert training["loader_images_per_s"] > 0


def test_check_says_how_many_times_as_fast_each_figure_is(monkeypatch, tmp_path):
    """Of an earlier commit that was slower in one thing, lacked another, and did not know a third benchmark."""
    before = {"rows": [{"images_per_s": 50.0}], "seconds": 4.0, "plain_s": 1.0}
    now = {"rows": [{"images_per_s": 100.0}], "seconds": 8.0, "plain_s": 1.0, "new_ms": 3.0, "batch": 64}
    monkeypatch.setattr(check, "measure", lambda name, side: now if side == check.ROOT else before)
    rows = {row["figure"]: row["times_as_fast"] for row in check.compare("stage1", tmp_path, rounds=2)}
    assert rows == {"rows.0.images_per_s": 2, "seconds": 0.5, "plain_s": 1}


def test_check_runs_this_commit_beside_itself_and_leaves_nothing(capsys):
    if subprocess.run(["git", "-C", str(check.ROOT), "rev-parse"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    check.QUICK["stage1"], kept = f"--arch {TINY} --batch 8 --identities 8 --rounds 1", check.QUICK["stage1"]
    try:
        result = check.run(["--against", "HEAD", "--only", "stage1", "--rounds", "1"])
    finally:
        check.QUICK["stage1"] = kept
    assert {row["benchmark"] for row in result["figures"]} == {"stage1"} and not result["absent"]
    assert "times as fast" in capsys.readouterr().err
    assert "bench-check-" not in check._git(check.ROOT, "worktree", "list")


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


def test_scale_sends_as_many_bytes_at_20000_identities_as_at_1000_in_both_stages(tmp_path):
    sizes = ["--arch", TINY, "--image-size", "32x32", "--batch", "16", "--identities", "1000", "20000"]
    result = scale.run([*sizes, "--ranks", "2", "--steps", "1", "--out", str(tmp_path)])
    assert [(row["stage"], row["identities"]) for row in result["rows"]] == [
        (s, n) for s in (1, 2) for n in (1000, 20000)
    ]
    assert min(row[key] for row in result["rows"] for key in ("step_ms", "sent_bytes", "peak_memory_mb")) > 0
    for row in result["over_fewest_identities"]:
        assert row["sent_bytes"] == pytest.approx(1, abs=0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"scale.json", "scale.md", "scale.png"}


def test_cluster_predicts_from_a_worker_and_counted_bytes_and_says_how_far_off_it_is_here(tmp_path):
    sizes = ["--arch", TINY, "--image-size", "32x32", "--batch", "32", "--identities", "500", "--stages", "1"]
    result = cluster.run([*sizes, "--steps", "1", "--out", str(tmp_path)])
    for rows in result["predicted"].values():
        assert [row["gpus"] for row in rows] == [2**power for power in range(10)]
        assert rows[0]["efficiency"] == 1 and rows[0]["network_ms"] == 0
    assert [one["processes"] for one in result["check"]] == [1, 2, 4]
    assert min(one["predicted_over_measured"] for one in result["check"]) > 0
    for one in result["check"][1:]:
        assert one["predicted_bytes"] == pytest.approx(one["counted_bytes"], rel=0.2)
    assert {path.name for path in tmp_path.iterdir()} == {"cluster.json", "cluster.md", "cluster.png"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["scale", "--batch", "6"],
        ["scale", "--identities", "10"],
        ["scale", "--image-size", "64"],
        ["scale", "--ranks", "3"],
        ["cluster", "--batch", "8"],
        ["cluster", "--fixed-batch", "64"],
        ["cluster", "--gbit-per-s", "0"],
        ["rerank", "--settings", "20"],
        ["stage1", "--batch", "5"],
        ["pack", "--images", "3"],
        ["stage2", "--cases", "vit"],
        ["stage1", "--rounds", "0"],
        ["stage2", "--steps", "0"],
        ["feed", "--batch", "6"],
        ["feed", "--identities", "2"],
        ["gpu"],
        ["gpu", "--out", "gpu", "--only", "nosuch"],
        ["check"],
        ["checkpoint", "--rounds", "0"],
    ],
)
def test_a_mistake_is_refused_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_check_refuses_a_commit_that_is_not_there():
    with pytest.raises(ConfigError, match="--against nosuch: git cannot check it out"):
        main(["check", "--against", "nosuch"])


@pytest.mark.parametrize("name", ["stage1", "stage2", "rerank", "evaluate", "feed"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match="--device cuda:99: there is no such device here; use cpu"):
        main([name, "--device", "cuda:99"])


def test_the_promised_benchmarks_are_there():
    promised = ["check", "checkpoint", "cluster", "evaluate", "feed", "gpu", "loader", "pack", "rerank", "sampler"]
    assert names() == [*promised, "scale", "stage1", "stage2"]
