"""evaluate.py and extract.py: weights of every kind, feature files, the reference figures, and what is refused."""

import csv
import errno
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from clipreid.errors import ModelError
from clipreid.model.arch import check_arch
from clipreid.retrieval import vehicleid as protocols
from clipreid.retrieval.metrics import retrieve
from clipreid.retrieval.positives import Labels
from clipreid.retrieval.vehicleid import draw_gallery, vehicleid_draw
from clipreid.weights.file import load_models, read_card, save_model
from clipreid.weights.initial import build_models
from cluster.checks.before_run import check_run
from cluster.errors import ConfigError
from cluster.evaluation.evaluate import evaluate as evaluate_in_team
from cluster.evaluation.feature_file import read_pair
from cluster.evaluation.find_weights import check_fits, local_weights, open_weights
from cluster.evaluation.metrics import RetrievalSet, RetrievalSettings, normalize_rows
from cluster.evaluation.per_query import PerQueryFile
from cluster.evaluation.result_file import default_place
from cluster.evaluation.trained import FEATURES, training_facts
from cluster.ranks.team import Team
from cluster.settings.model_spec import model_spec
from cluster.settings.yaml_file import load_config
from launch import evaluate, export, extract, figures
from shards import storage
from shards.errors import DataError
from shards.loading.index import ShardIndex
from shards.packing.build import build
from tests.helpers.golden_models import ROOT_CONFIGS, clip_state, read_case
from tests.helpers.runs import ROOT, config_file, environment, launch, overrides, train
from tests.helpers.shards import write_shards
from tests.helpers.tolerances import close


def evaluated(*arguments, out):
    """metrics.json of evaluate.py."""
    evaluate.main([*map(str, arguments), "--out", str(out)])
    return json.loads(out.read_text())


def extracted(*arguments, out):
    extract.main([*map(str, arguments), "--out", str(out)])
    with np.load(out) as file:
        return {name: file[name] for name in file.files}


# --- weights


@pytest.fixture(scope="module")
def run(tiny_shards, tmp_path_factory):
    """A finished run with side information and re-ranking: its folder, and the arguments that evaluate it."""
    folder = tmp_path_factory.mktemp("run")
    short = {"cluster__launcher": "local", "stage1__epochs": 1, "stage2__epochs": 1}
    settings = overrides(tiny_shards, folder / "run", model__sie="camera", eval__rerank="[4,2,0.3]", **short)
    train(config_file(folder), *settings)
    arguments = ["--config", folder / "run" / "config.yaml", "--weights", folder / "run"]
    return SimpleNamespace(folder=folder / "run", arguments=arguments, config=arguments[:2])


@pytest.fixture(scope="module")
def own_metrics(run):
    metrics = json.loads((run.folder / "metrics.json").read_text())
    del metrics["untrained"]
    return metrics


def test_the_weights_of_a_run_give_its_own_metrics(run, own_metrics, tmp_path, capsys):
    assert "mAP" in own_metrics and "mAP" in own_metrics["rerank"]
    assert evaluated(*run.arguments, out=tmp_path / "metrics.json") == own_metrics
    printed = capsys.readouterr()
    assert "re-ranked" in printed.out and str(tmp_path / "metrics.json") in printed.out and not printed.err
    evaluated(*run.arguments, "eval.descriptor=[pre]", out=tmp_path / "pre.json")
    note = f"note: eval.descriptor is ['pre'] here, {run.folder} was evaluated by ['img', 'proj'] in its run\n"
    assert capsys.readouterr().err == note
    other_rule = evaluated(*run.arguments, "eval.rule=none", out=tmp_path / "none.json")
    assert other_rule["mAP"] != own_metrics["mAP"]


def test_extracted_features_give_the_metrics_of_the_weights(run, own_metrics, tiny_shards, tmp_path):
    files = [tmp_path / "query.npz", tmp_path / "gallery.npz"]
    parts = [extracted(*run.arguments, "--split", file.stem, out=file) for file in files]
    assert evaluated("--features", *files, "--rerank", "4,2,0.3", out=tmp_path / "metrics.json") == own_metrics

    rows = ShardIndex.open(str(tiny_shards)).split("query")
    query = parts[0]
    assert query["features"].dtype == np.float32 and query["features"].shape == (len(rows), 48)
    assert all(query[name].dtype.kind == "U" for name in ("identities", "keys", "splits", "lists", "times"))
    assert query["cameras"].dtype == query["views"].dtype == np.int64
    for name, column in (("keys", rows.keys), ("identities", rows.identity), ("cameras", rows.cameras)):
        assert query[name].tolist() == column.tolist()
    assert set(query["splits"]) == {"query"}
    close(np.linalg.norm(query["features"], axis=1), np.ones(len(rows)), rtol=1e-6)


def test_a_checkpoint_in_the_authors_format_gives_the_metrics_of_the_run(run, own_metrics, tmp_path):
    official = tmp_path / "official.pth"
    export.main(["--weights", str(run.folder), "--format", "official", "--out", str(official)])
    assert evaluated(*run.config, "--weights", official, out=tmp_path / "metrics.json") == own_metrics


def test_weights_are_read_from_a_url(run):
    content = (run.folder / "model.safetensors").read_bytes()
    with storage.write_atomic("memory://runs/one/model.safetensors") as file:
        file.write(content)
    for weights in ("memory://runs/one", "memory://runs/one/model.safetensors"):
        with local_weights(weights) as path:
            assert path.read_bytes() == content
    with (
        pytest.raises(ConfigError, match="memory://runs/two/model.safetensors: no such file"),
        local_weights("memory://runs/two"),
    ):
        pass


@pytest.fixture(scope="module")
def clip(run, tmp_path_factory):
    """CLIP weights in a file, and the arguments that apply them without side information."""
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(clip_state(check_arch(str(ROOT_CONFIGS / "tiny_vit.json"))), path)
    return [*run.config, "--weights", path, "model.sie=none", "eval.rerank=null"]


def test_clip_weights_give_the_metrics_of_an_untrained_run(clip, tmp_path):
    config = load_config(clip[1], clip[4:])
    index = ShardIndex.open(config.data.shards)
    model, *_ = build_models(model_spec(config, index), str(clip[3]), config.run.seed)
    assert evaluated(*clip, out=tmp_path / "metrics.json") == evaluate_in_team(model, index, config, Team())


def test_vehicleid_gives_the_same_from_weights_and_from_their_features(clip, tmp_path):
    images = tmp_path / "images"
    launch("pack.py", "render", "--out", images, "--identities", 8, "--images", 3, "--layout", "vehicleid")
    launch("pack.py", "build", "--dataset", "vehicleid", "--root", images, "--out", tmp_path / "shards")
    arguments = [*clip, f"data.shards={tmp_path / 'shards'}", "eval.draws=3"]
    metrics = evaluated(*arguments, out=tmp_path / "weights.json")
    assert list(metrics) == ["small", "medium", "large"]
    extracted(*arguments, "--split", "test", out=tmp_path / "test.npz")
    protocol = ["--protocol", "vehicleid", "--draws", 3, "--seed", 0]
    assert evaluated("--features", tmp_path / "test.npz", *protocol, out=tmp_path / "features.json") == metrics

    for change, reason in (
        (
            "eval.rerank=[4,2,0.3]",
            r"eval.rerank: \[4, 2, 0.3\] has no effect on .*VehicleID protocol, .* eval.rerank=null",
        ),
        (
            "eval.rule=camera_time",
            "eval.rule: camera_time has no effect on .*VehicleID protocol, .* set eval.rule=none",
        ),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            evaluated(*arguments, change, out=tmp_path / "refused.json")
        assert "\n" not in str(caught.value) and not (tmp_path / "refused.json").exists()
        with pytest.raises(ConfigError, match=reason):
            check_run(load_config(arguments[1], [*map(str, arguments[4:]), change]))


def pack_with_times(folder):
    """Four identities seen by two cameras at two times, some of them unknown, from a manifest; the packed dataset."""
    rng = np.random.default_rng(0)
    rows = ["path,identity,split,camera,time"]
    for number in range(64):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        split = ("train", "query", "gallery", "gallery")[number % 4]
        time = ("noon", "night", "")[rng.integers(3)]
        rows.append(f"{number}.png,id{number // 4 % 4},{split},{rng.integers(2)},{time}")
    (folder / "images.csv").write_text("\n".join(rows))
    build("manifest", [str(folder / "images.csv")], str(folder / "shards"), processes=1)
    return folder / "shards"


def mAP_by_sorting(query, gallery):
    """Leaving out what has the query's identity, camera and time, where the time is known."""
    precisions = []
    for q in range(len(query["features"])):
        order = np.argsort(-gallery["features"] @ query["features"][q], kind="stable")
        same = {name: gallery[name][order] == query[name][q] for name in ("identities", "cameras", "times")}
        left = ~(np.logical_and.reduce(list(same.values())) & (query["times"][q] != ""))
        ranks = np.flatnonzero(same["identities"][left]) + 1
        precisions.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    return np.mean(precisions)


def test_times_of_a_manifest_reach_the_rule_camera_time(clip, tmp_path):
    """From its column through shards and weights, and through extractions and the command line."""
    arguments = [*clip, f"data.shards={pack_with_times(tmp_path)}"]
    files = [tmp_path / "query.npz", tmp_path / "gallery.npz"]
    query, gallery = (extracted(*arguments, "--split", file.stem, out=file) for file in files)
    assert set(query["times"]) == set(gallery["times"]) == {"noon", "night", ""}
    out = tmp_path / "metrics.json"
    found = {rule: evaluated(*arguments, f"eval.rule={rule}", out=out)["mAP"] for rule in ("camera_time", "camera")}
    assert evaluated("--features", *files, "--rule", "camera_time", out=out)["mAP"] == found["camera_time"]
    assert found["camera_time"] == pytest.approx(mAP_by_sorting(query, gallery), abs=1e-9) != found["camera"]


def test_an_evaluation_makes_strings_of_images_only_where_they_are_asked_for(tmp_path):
    """A gallery of 20,000,000 keys and times is gigabytes of Python objects on every rank."""
    index = ShardIndex.open(str(pack_with_times(tmp_path)), str(tmp_path / "cache"))
    split = index.split("gallery")
    features = np.zeros((len(split), 2), np.float32)

    def of(rule, per_query=None):
        found = RetrievalSet.of_split(features, split, RetrievalSettings(rule, per_query=per_query))
        return found.labels.times, found.keys

    assert of("camera") == of("none") == (None, None)
    assert not {"times", "keys", "_keys"} & set(vars(split))  # what has been read of the index is kept there
    times, keys = of("camera_time", PerQueryFile("unused.csv"))
    assert set(times) == {"noon", "night", ""} and keys.tolist() == split.keys.tolist()


MISFITS = {
    "model.image_size=[64,64]": (
        r"model.image_size is \[32, 32\] in the weights, \[64, 64\] in the configuration "
        r"\(positional_embedding \(17, 32\) and \(65, 32\)\)"
    ),
    "model.stride=4": r"model.stride is 8 .*, 4 in the configuration \(positional_embedding \(17, 32\) and \(50, 32\)",
    "model.sie=none": "model.sie is camera in the weights, none in the configuration",
    "model.sie_coefficient=3": "model.sie_coefficient is 1.0 in the weights, 3.0",
    "model.arch=configs/models/small_vit.json": "model.arch is .*tiny_vit.json in the weights, .*another architecture",
    "data.pixel_mean=[0.4,0.5,0.5]": r"data.pixel_mean is \[0.5, 0.5, 0.5\] in the weights, \[0.4, 0.5, 0.5\]",
}


@pytest.mark.parametrize("change", MISFITS)
def test_settings_that_contradict_the_weights_are_refused(run, change, tmp_path):
    with pytest.raises(ConfigError, match=MISFITS[change]) as caught:
        evaluated(*run.arguments, change, out=tmp_path / "metrics.json")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_dataset_with_other_cameras_is_refused_with_both_shapes(run):
    card, config = read_card(run.folder / "model.safetensors"), load_config(run.folder / "config.yaml")
    check_fits(card, config, SimpleNamespace(cameras=20, views=0), "run")
    with pytest.raises(ConfigError, match=r"cv_embed is \(20, 32\), .* needs \(9, 32\)"):
        check_fits(card, config, SimpleNamespace(cameras=9, views=0), "run")


@pytest.mark.parametrize(
    ("name", "rows", "reason"),
    [
        ("cv_embed", 7, r"cv_embed is \(7, 32\), the configuration needs \(20, 32\)"),
        ("classifier.weight", 9, r"classifier_proj.weight is \(8, 16\), the configuration needs \(9, 16\)"),
        ("image_encoder.positional_embedding", 26, r"positional_embedding is \(26, 32\), .* needs \(17, 32\)"),
    ],
)
def test_official_weights_of_another_dataset_are_refused_with_both_shapes(run, name, rows, reason, tmp_path):
    path = tmp_path / "official.pth"
    export.main(["--weights", str(run.folder), "--format", "official", "--out", str(path)])
    state = torch.load(path, weights_only=True)
    torch.save(state | {name: torch.zeros(rows, 32)}, path)
    with pytest.raises(ModelError, match=reason):
        evaluated(*run.config, "--weights", path, out=tmp_path / "metrics.json")


# --- a folder of images


def test_images_of_a_folder_get_the_features_of_packed_ones(clip, tiny_shards, tmp_path):
    folder = tiny_shards.parent / "images" / "image_query"
    packed = extracted(*clip, "--split", "query", out=tmp_path / "packed.npz")
    loose = extracted(*clip, "--images", folder, "data.shards=none", out=tmp_path / "loose.npz")
    assert loose["keys"].tolist() == sorted(path.name for path in folder.iterdir())
    place = {f"image_query_{Path(name).stem}": row for row, name in enumerate(loose["keys"])}
    order = [place[key] for key in packed["keys"]]
    assert np.array_equal(loose["features"][order], packed["features"])
    assert set(loose["cameras"]) == {-1} and set(loose["identities"]) == {""}


def test_the_authors_weights_are_used_on_a_dataset_of_other_identities_and_another_noun(run, tmp_path):
    """Classifiers and prompts are of the training set; features need neither."""
    other = write_shards(tmp_path / "s", {"train": {"t": 2}, "query": {"a": 2, "b": 2}, "gallery": {"a": 2, "b": 2}})
    official = tmp_path / "official.pth"
    export.main(["--weights", str(run.folder), "--format", "official", "--out", str(official)])
    settings = [*run.config, f"data.shards={other}", "model.prompt_tokens=7", "eval.rerank=null"]
    settings += ["model.sie_coefficient=0"]
    facts = json.loads((tmp_path / "s" / "dataset.json").read_text())
    (tmp_path / "s" / "dataset.json").write_text(json.dumps(facts | {"cameras": 20}))
    metrics = evaluated(*settings, "--weights", official, out=tmp_path / "metrics.json")
    assert metrics["queries"] == 4
    features = extracted(*settings, "--weights", official, "--split", "query", out=tmp_path / "q.npz")
    assert features["features"].shape == (4, 48)
    drawn = ["--weights", str(official), "--out", str(tmp_path / "p"), "--figure"]
    figures.main([*map(str, settings), *drawn, "tsne", "ranked"])
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"tsne.png", "ranked.png"}
    with pytest.raises(ConfigError, match="of other training identities"):
        figures.main([*map(str, settings), *drawn, "relevance"])


def test_the_authors_weights_describe_a_folder_without_their_dataset(run, tmp_path):
    """Identities and side information follow from the file's shapes."""
    export.main(["--weights", str(run.folder), "--format", "official", "--out", str(tmp_path / "official.pth")])
    (tmp_path / "images" / "deeper").mkdir(parents=True)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "images" / "deeper" / "a.png")
    (tmp_path / "images" / "Thumbs.db").touch()
    what = ["--images", tmp_path / "images", "data.shards=none"]
    own = extracted(*run.arguments, *what, out=tmp_path / "own.npz")
    official = extracted(*run.config, "--weights", tmp_path / "official.pth", *what, out=tmp_path / "official.npz")
    assert own["keys"].tolist() == ["deeper/a.png"]
    assert np.array_equal(own["features"], official["features"])


def test_a_folder_that_cannot_be_described_is_refused(clip, tmp_path):
    (tmp_path / "images").mkdir()
    arguments = [*clip, "--images", tmp_path / "images"]
    with pytest.raises(DataError, match=r"images: holds no images \(\.jpg"):
        extracted(*arguments, out=tmp_path / "out.npz")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xffnothing")
    with pytest.raises(DataError, match=r"images/broken.jpg: can't be read as an image"):
        extracted(*arguments, out=tmp_path / "out.npz")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        extracted(*clip, "--images", tmp_path / "nowhere", out=tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


# --- feature files: the reference figures through the command line


def columns(features, identities, cameras=None, prefix=""):
    found = {"features": features, "identities": identities} | ({} if cameras is None else {"cameras": cameras})
    return {prefix + name: value for name, value in found.items()}


def assert_golden(metrics, mAP, cmc):
    close(metrics["mAP"], mAP, atol=1e-6)
    close([metrics["R1"], metrics["R5"], metrics["R10"]], cmc, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "flags", "junk"),
    [("normalised", [], False), ("raw", ["--no-normalize"], False), ("raw_junk_kept", ["--no-normalize"], True)],
)
def test_retrieval_matches_the_reference_figures(name, flags, junk, tmp_path):
    """From one file with integers, and from two with strings."""
    golden, _ = read_case("retrieval")
    kept = np.full(len(golden["g_pid"]), True) if junk else golden["g_pid"] != -1
    query = [golden[f"q_{part}"] for part in ("feat", "pid", "cam")]
    gallery = [golden[f"g_{part}"][kept] for part in ("feat", "pid", "cam")]
    np.savez(tmp_path / "one.npz", **columns(*query, prefix="query_"), **columns(*gallery, prefix="gallery_"))
    for file, (features, identities, cameras) in (("q", query), ("g", gallery)):
        np.savez(tmp_path / f"{file}.npz", **columns(features, identities.astype(str), cameras))
    one = evaluated("--features", tmp_path / "one.npz", *flags, out=tmp_path / "one.json")
    two = evaluated("--features", tmp_path / "q.npz", tmp_path / "g.npz", *flags, out=tmp_path / "two.json")
    assert one == two
    assert_golden(one, golden[f"{name}__mAP"], golden[f"{name}__cmc_1_5_10"])
    assert (one["queries"], one["valid_queries"]) == (200, golden[f"{name}__valid_queries"])


def test_re_ranking_matches_the_reference_figures(tmp_path):
    golden, _ = read_case("rerank_k20_6")
    sides = [columns(golden[f"{s[0]}_feat"], golden[f"{s[0]}_pid"], prefix=s) for s in ("query_", "gallery_")]
    np.savez(tmp_path / "features.npz", **sides[0], **sides[1])
    flags = ["--rule", "none", "--no-normalize", "--rerank", "20,6,0.3"]
    metrics = evaluated("--features", tmp_path / "features.npz", *flags, out=tmp_path / "metrics.json")
    assert_golden(metrics["rerank"], golden["mAP"], golden["cmc_1_5_10"])
    assert metrics["mAP"] != metrics["rerank"]["mAP"]


def test_vehicleid_trials_match_the_reference_figures(tmp_path):
    """Each draw of the reference as a pair of query and gallery."""
    golden, _ = read_case("vehicleid")
    for trial, picks in enumerate(golden["gallery_picks"]):
        rest = np.setdiff1d(np.arange(len(golden["pid"])), picks)
        for name, rows in (("q", rest), ("g", picks)):
            np.savez(tmp_path / f"{name}.npz", **columns(golden["features"][rows], golden["pid"][rows]))
        files = tmp_path / "q.npz", tmp_path / "g.npz"
        metrics = evaluated("--features", *files, "--rule", "none", out=tmp_path / "metrics.json")
        assert_golden(metrics, golden["mAP"][trial], golden["cmc_1_5_10"][trial])


def test_vehicleid_means_match_the_reference_figures(tmp_path, monkeypatch):
    """The whole protocol, with the reference's draws in place of the seeded ones."""
    golden, _ = read_case("vehicleid")
    monkeypatch.setattr(protocols, "draw_gallery", lambda identities, seed, draw: golden["gallery_picks"][draw])
    arrays = columns(golden["features"], golden["pid"]) | {"lists": np.full(len(golden["pid"]), "800")}
    test = features_file(tmp_path / "test.npz", arrays)
    metrics = evaluated("--features", test, "--protocol", "vehicleid", out=tmp_path / "metrics.json")["small"]
    assert abs(metrics["mAP"]["mean"] - golden["mean_mAP"]) < 1e-6
    means = [metrics["R1"]["mean"], metrics["R5"]["mean"]]
    close(means, golden["mean_cmc_1_5_10"][:2], atol=1e-6)


def test_vehicleid_is_evaluated_from_one_extraction_over_seeded_draws(tmp_path, capsys):
    golden, _ = read_case("vehicleid")
    lists = np.where(golden["pid"] < np.median(golden["pid"]), "800,1600", "1600")
    np.savez(tmp_path / "test.npz", **columns(golden["features"], golden["pid"].astype(str)), lists=lists)
    protocol = ["--features", tmp_path / "test.npz", "--protocol", "vehicleid"]
    metrics = evaluated(*protocol, "--draws", "4", "--seed", "7", out=tmp_path / "metrics.json")
    features = F.normalize(torch.from_numpy(golden["features"]))
    identities = golden["pid"].astype(str)
    trials = [vehicleid_draw(features, identities, draw_gallery(identities, 7, draw)).metrics() for draw in range(4)]
    assert list(metrics) == ["small", "medium"]
    for name in ("mAP", "R1", "R5"):
        values = [trial[name] for trial in trials]
        assert metrics["medium"][name] == pytest.approx({"mean": np.mean(values), "std": np.std(values)}, abs=1e-9)
    assert metrics["medium"]["gallery"] == 60 > metrics["small"]["gallery"]
    assert "small" in capsys.readouterr().out
    ten = evaluated(*protocol, out=tmp_path / "ten.json")["medium"]["mAP"]
    assert abs(ten["mean"] - golden["mean_mAP"]) < 2 * ten["std"]


# --- feature files: how they are read, single queries, and what can be said of little


def random_pair(queries, gallery, seed=0, width=16):
    """The arrays of one file: 5 identities, 3 cameras; the last query's identity is not in the gallery."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for side, n in (("query_", queries), ("gallery_", gallery)):
        features = rng.standard_normal((n, width)).astype(np.float32)
        arrays |= columns(features, rng.integers(0, 5, n), rng.integers(0, 3, n), side)
    arrays["query_identities"][-1] = 99
    return arrays


def features_file(path, arrays, save=np.savez):
    save(path, **arrays)
    return path


def test_features_are_mapped_where_a_file_holds_them_uncompressed(tmp_path):
    arrays = random_pair(9, 40)
    turned = {"gallery_features": np.asfortranarray(arrays["gallery_features"])}
    double = {name: arrays[name].astype(float) for name in ("query_features", "gallery_features")}
    files = [
        features_file(tmp_path / "plain.npz", arrays),
        features_file(tmp_path / "packed.npz", arrays, np.savez_compressed),
        features_file(tmp_path / "turned.npz", arrays | turned),
        features_file(tmp_path / "double.npz", arrays | double),
    ]
    pairs = [read_pair([str(path)], "camera") for path in files]
    assert all(isinstance(part.features, np.memmap) for part in pairs[0])
    assert not any(isinstance(part.features, np.memmap) for part in pairs[1])
    for pair in pairs:
        for side, part in zip(("query", "gallery"), pair, strict=True):
            np.testing.assert_array_equal(part.features, arrays[f"{side}_features"])
    found = [evaluated("--features", path, out=tmp_path / "metrics.json") for path in files]
    assert found == [found[0]] * 4


def test_a_mapped_file_is_left_as_it_is_and_its_checksum_compared(tmp_path):
    path = features_file(tmp_path / "features.npz", random_pair(9, 40))
    before = path.read_bytes()
    evaluated("--features", path, "--normalize", out=tmp_path / "metrics.json")
    assert path.read_bytes() == before
    with np.load(path) as file:
        place = before.index(file["gallery_features"].tobytes()) + 100
    path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
    with pytest.raises(ConfigError, match="features.npz: is not a complete .npz file .*CRC"):
        evaluated("--features", path, out=tmp_path / "metrics.json")


def test_each_query_is_listed_on_request(tmp_path):
    arrays = random_pair(30, 200)
    files = []
    for side in ("query", "gallery"):
        own = {name.removeprefix(f"{side}_"): value for name, value in arrays.items() if name.startswith(side)}
        keys = np.array([f"{side}/{row}.jpg" for row in range(len(own["features"]))])
        files.append(features_file(tmp_path / f"{side}.npz", own | {"keys": keys}))
    table, out = tmp_path / "queries.csv", tmp_path / "metrics.json"
    plain = evaluated("--features", *files, "--no-normalize", out=out)
    assert evaluated("--features", *files, "--no-normalize", "--per-query", table, "--top-k", 4, out=out) == plain
    lines = list(csv.DictReader(table.open()))
    labels = [Labels(arrays[f"{side}_identities"], arrays[f"{side}_cameras"]) for side in ("query", "gallery")]
    query, gallery = torch.from_numpy(arrays["query_features"]), arrays["gallery_features"]
    result = retrieve(query, labels[0], gallery, labels[1], rule="camera", top_k=4)
    assert [line["query"] for line in lines] == [f"query/{row}.jpg" for row in range(30)]
    valid = [line for line in lines if line["AP"]]
    assert np.mean([float(line["AP"]) for line in valid]) == pytest.approx(plain["mAP"], abs=1e-12)
    assert np.mean([line["first_rank"] == "1" for line in valid]) == pytest.approx(plain["R1"], abs=1e-12)
    assert lines[-1]["positives"] == "0" and lines[-1]["AP"] == lines[-1]["first_rank"] == ""
    for line, rows, distances in zip(lines, result.nearest.rows, result.nearest.distances, strict=True):
        assert [line[f"nearest_{k}"] for k in range(1, 5)] == [f"gallery/{row}.jpg" for row in rows]
        close([float(line[f"distance_{k}"]) for k in range(1, 5)], distances, atol=2e-6)  # Six decimals.

    arrays = random_pair(3, 2) | {"gallery_identities": np.array([0, 1]), "query_identities": np.array([0, 1, 1])}
    one = features_file(tmp_path / "one.npz", arrays)
    evaluated("--features", one, "--rule", "none", "--per-query", table, "--top-k", 3, out=out)
    line = next(csv.DictReader(table.open()))
    assert {line["nearest_1"], line["nearest_2"]} == {"0", "1"} and line["nearest_3"] == line["distance_3"] == ""


def test_queries_are_listed_by_key_from_weights(clip, tiny_shards, tmp_path):
    table = tmp_path / "queries.csv"
    metrics = evaluated(*clip, "--per-query", table, "--top-k", 2, out=tmp_path / "metrics.json")
    lines = list(csv.DictReader(table.open()))
    index = ShardIndex.open(str(tiny_shards))
    assert [line["query"] for line in lines] == index.split("query").keys.tolist()
    assert {line["nearest_1"] for line in lines} <= set(index.split("gallery").keys.tolist())
    assert np.mean([float(line["AP"]) for line in lines if line["AP"]]) == pytest.approx(metrics["mAP"], abs=1e-12)


def test_a_gallery_smaller_than_ten_has_all_ranks(tmp_path):
    """R10 of a gallery of 5 is that of its 5 images, all of which are found."""
    arrays = random_pair(20, 5) | {"gallery_identities": np.arange(5)}
    file = features_file(tmp_path / "few.npz", arrays)
    metrics = evaluated("--features", file, "--rule", "none", out=tmp_path / "metrics.json")
    assert metrics["R10"] == metrics["R5"] == 1.0 and 0 < metrics["R1"] < 1
    assert (metrics["queries"], metrics["valid_queries"]) == (20, 19)
    assert set(metrics["TPR@FPR"]) == {"1e-4", "1e-3", "1e-2"}


def test_features_that_cannot_be_evaluated_are_told_in_one_line(tmp_path):
    """Through the command itself: exit code 2, one line, no metrics."""
    arrays = random_pair(6, 12)
    one_camera = {"query_cameras": np.zeros(6, int), "gallery_cameras": np.zeros(12, int)}
    nothing = {name: value[:0] for name, value in arrays.items() if name.startswith("gallery")}
    broken = arrays["query_features"].copy()
    broken[4, 2] = np.nan
    cases = [
        ({"query_identities": np.arange(100, 106)}, "none of 6 queries has a gallery image of its identity that rule"),
        (one_camera, "rule 'camera' leaves: check the splits, or use another rule"),
        (nothing, "gallery_features is float32 (0, 16), needed are numbers [images, values]"),
        ({"gallery_features": np.ones((12, 5))}, "query_features have 16 values an image, gallery_features 5"),
        ({"query_features": broken}, "query_features: row 4 holds values that are not finite"),
    ]
    for number, (changes, reason) in enumerate(cases):
        path, out = features_file(tmp_path / f"{number}.npz", arrays | changes), tmp_path / f"{number}.json"
        done = launch("evaluate.py", "--features", path, "--out", out, check=False)
        assert done.returncode == 2 and reason in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("case", ["gallery", "gallery re-ranked", "test"])
def test_a_feature_that_is_not_finite_is_named_by_file_row_and_key(value, case, tmp_path):
    """By its row in the file, whatever the order in which rows are compared or drawn."""
    arrays = {"features": np.ones((40, 4)), "identities": np.arange(40)[::-1] % 8, "cameras": np.arange(40) % 3}
    arrays |= {"keys": np.array([f"image{row}" for row in range(40)]), "lists": np.full(40, "800")}
    query = features_file(tmp_path / "query.npz", arrays)
    arrays["features"][23, 1] = value
    files = [features_file(tmp_path / "bad.npz", arrays)]
    flags = ["--protocol", "vehicleid"] if case == "test" else ["--rerank", "4,2,0.3"] if "ranked" in case else []
    files = files if case == "test" else [query, *files]
    reason = r"bad.npz: features: row 23 \(key image23\) holds values that are not finite: extract it .* weights"
    with pytest.raises(ModelError, match=reason) as caught:
        evaluated("--features", *files, *flags, out=tmp_path / "metrics.json")
    assert "\n" not in str(caught.value) and not (tmp_path / "metrics.json").exists()


def test_rows_of_unit_length_keep_every_bit():
    rows = F.normalize(torch.randn(500, 64, generator=torch.Generator().manual_seed(0)))
    features = torch.cat([rows, rows * 1.001, torch.zeros(1, 64)]).numpy()
    normalize_rows(features)
    assert np.array_equal(features[:500], rows.numpy())
    close(features[500:1000], rows, rtol=1e-6, atol=1e-7)
    assert not features[1000].any()


def test_an_extraction_of_a_plain_folder_is_nothing_to_evaluate(clip, tmp_path):
    """Nothing is known of its images: they are not all of one identity."""
    for place in range(4):
        Image.fromarray(np.random.default_rng(place).integers(0, 255, (32, 32, 3), np.uint8)).save(
            tmp_path / f"{place}.png"
        )
    arrays = extracted(*clip, "--images", tmp_path, out=tmp_path / "photos.npz")
    assert arrays["identities"].tolist() == [""] * 4
    known = features_file(tmp_path / "known.npz", arrays | {"identities": np.array(list("abcd"))})
    for files in (["photos", "photos"], ["known", "photos"], ["photos", "known"]):
        reason = "photos.npz: features: nothing to evaluate, none of 4 images has an identity .*--dataset manifest"
        with pytest.raises(ModelError, match=reason):
            evaluated("--features", *(tmp_path / f"{name}.npz" for name in files), out=tmp_path / "metrics.json")
    assert known.exists() and not (tmp_path / "metrics.json").exists()


def test_features_of_unknown_identity_change_no_figure_of_the_others(tmp_path):
    """As numbers and as text; also re-ranked figures count no query of unknown identity."""
    arrays = random_pair(30, 90)
    plain = evaluated(
        "--features", features_file(tmp_path / "plain.npz", arrays), "--rerank", "4,2,0.3", out=tmp_path / "m.json"
    )
    rows = np.r_[np.arange(30), np.zeros(5, int)]
    more = {name: value[rows] for name, value in arrays.items() if name.startswith("query_")}
    more["query_identities"][30:] = -1
    for kind in (int, str):
        some = arrays | more
        some |= {name: some[name].astype(kind) for name in ("query_identities", "gallery_identities")}
        found = evaluated("--features", features_file(tmp_path / "more.npz", some), out=tmp_path / "m.json")
        assert (found.pop("unknown_identity"), found.pop("queries")) == (5, 35)
        assert found == {name: plain[name] for name in found}
    found = evaluated("--features", tmp_path / "more.npz", "--rerank", "4,2,0.3", out=tmp_path / "m.json")["rerank"]
    assert (found["unknown_identity"], found["valid_queries"]) == (5, plain["valid_queries"])


@pytest.mark.parametrize("missing", [1, 100, 16 * 40 * 4])
def test_a_member_shorter_than_its_header_says_is_refused(missing, tmp_path):
    """A sound archive, whose next member's bytes would be read as features."""
    path = features_file(tmp_path / "whole.npz", random_pair(9, 40))
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "short.npz", "w") as short:
        for name in whole.namelist():
            content = whole.read(name)
            short.writestr(name, content[: len(content) - missing] if name == "gallery_features.npy" else content)
    reason = r"short.npz: gallery_features holds .* bytes, but its header says float32 \(40, 16\), 2,560 bytes"
    with pytest.raises(ConfigError, match=reason):
        evaluated("--features", tmp_path / "short.npz", out=tmp_path / "metrics.json")


# --- what is refused

GOOD = {
    f"{side}_{name}": value
    for side, n in (("query", 2), ("gallery", 3))
    for name, value in columns(np.eye(3, 4, dtype=np.float32)[:n], np.arange(n), np.arange(n) + n).items()
}
BAD_FILES = [
    ({"query_features": None, "gallery_identities": None}, "lacks query_features, gallery_identities; it holds query_"),
    ({"gallery_cameras": None}, "lacks gallery_cameras; .*not needed with --rule none"),
    ({"gallery_features": np.ones((3, 5))}, "query_features have 4 values an image, gallery_features 5"),
    ({"gallery_features": np.ones(3)}, r"gallery_features is float64 \(3,\), needed are numbers"),
    ({"gallery_features": np.ones((0, 4))}, r"gallery_features is float64 \(0, 4\)"),
    ({"query_cameras": np.arange(3)}, r"query_cameras is int64 \(3,\), needed are integers \(2,\)"),
    ({"query_cameras": np.array(["1", "2"])}, "query_cameras is <U1"),
    ({"query_identities": np.array(["1", "2"])}, "identities of the queries are strings, those of the gallery integ"),
    (
        {"query_identities": np.array([1, "x"], object)},
        "query_identities holds Python objects, which are not read; write numbers or strings",
    ),
]


@pytest.mark.parametrize(("changes", "reason"), BAD_FILES)
def test_a_feature_file_that_does_not_hold_what_is_needed_is_refused(changes, reason, tmp_path):
    arrays = {name: value for name, value in (GOOD | changes).items() if value is not None}
    np.savez(tmp_path / "features.npz", **arrays)
    with pytest.raises(ConfigError, match=reason) as caught:
        evaluated("--features", tmp_path / "features.npz", out=tmp_path / "metrics.json")
    assert "\n" not in str(caught.value) and str(tmp_path / "features.npz") in str(caught.value)


def test_files_that_are_no_pair_are_refused(tmp_path):
    for name in ("gallery", "query"):
        np.savez(tmp_path / f"{name}.npz", **columns(np.eye(2), np.arange(2), np.arange(2)), splits=[name] * 2)
    with pytest.raises(ConfigError, match="gallery.npz is the gallery .*: give the query first"):
        evaluated("--features", tmp_path / "gallery.npz", tmp_path / "query.npz", out=tmp_path / "metrics.json")
    with pytest.raises(ConfigError, match="lacks lists; .*split test"):
        evaluated("--features", tmp_path / "query.npz", "--protocol", "vehicleid", out=tmp_path / "metrics.json")
    np.save(tmp_path / "bare.npy", np.eye(2))
    with pytest.raises(ConfigError, match="bare.npy: holds one array without a name; write an .npz"):
        evaluated("--features", tmp_path / "bare.npy", out=tmp_path / "metrics.json")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "query.npz").read_bytes()[:200])
    with pytest.raises(ConfigError, match="cut.npz: is not a complete .npz file"):
        evaluated("--features", tmp_path / "cut.npz", out=tmp_path / "metrics.json")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("", "give --weights, or --features"),
        ("--config a.yaml", "give --weights, or --features"),
        ("--config a.yaml --weights b --rule none", "--rule belongs to --features"),
        ("--features a.npz --weights b", "--weights and --features exclude each other"),
        ("--features a b c", "3 files; give one or two"),
        ("--features a.npz --draws 3", "--draws does not go without --protocol vehicleid"),
        ("--features a.npz --protocol vehicleid --rerank 20,6,0.3", "--rerank does not go with --protocol vehicleid"),
        ("--features a.npz --rerank 20,6", "'20,6' is not K1,K2,LAMBDA such as 20,6,0.3"),
        ("--features a.npz --rerank 20,6,1.5", "'20,6,1.5' is not K1,K2,LAMBDA"),
        ("--features a.npz --top-k 5", "--top-k: the lists are written into --per-query FILE.csv, which is not given"),
        ("--features a.npz --per-query ./m.json --out m.json", "--per-query m.json: is the file of --out too"),
        ("--features a.npz --per-query nowhere/queries.csv", "--per-query nowhere/queries.csv: no such folder"),
        ("--features a.npz --protocol vehicleid --per-query q.csv", "--per-query does not go with --protocol vehicl"),
        ("--features a.npz --draws 0", "'0' is not a whole number above 0"),
        ("--features a.npz --protocol vehicleid --seed -1", "--seed: '-1' is not a whole number from 0"),
        ("--features a.npz --out nowhere/metrics.json", "--out nowhere/metrics.json: no such folder"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(arguments, reason, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(arguments.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2 and reason in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["metrics.json", "config.yaml", "status.json", "log.jsonl", "model.safetensors"])
def test_no_file_of_a_run_is_overwritten(run, name, capsys):
    before = (run.folder / name).read_bytes()
    with pytest.raises(SystemExit):
        evaluate.main([*map(str, run.arguments), "--out", str(run.folder / name)])
    assert f"is the {name} of a run; choose another name" in capsys.readouterr().err
    assert (run.folder / name).read_bytes() == before


def test_features_are_not_overwritten_by_their_figures(tmp_path, capsys):
    path = features_file(tmp_path / "features.npz", random_pair(9, 40))
    with pytest.raises(SystemExit):
        evaluate.main(["--features", str(path), "--out", str(path)])
    assert "is what is evaluated; choose another name" in capsys.readouterr().err


# --- where figures go that are given no place


def placed(*arguments, capsys):
    """Where evaluate.py says that the figures went, and what is there."""
    evaluate.main([*map(str, arguments)])
    path = Path(capsys.readouterr().out.rpartition("metrics: ")[2].strip())
    return path, json.loads(path.read_text())


def test_figures_go_beside_the_features_and_never_over_those_of_another_evaluation(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "metrics.json").write_text("{}")
    file = features_file(tmp_path / "features.npz", random_pair(30, 90))
    first, plain = placed("--features", file, capsys=capsys)
    assert first == tmp_path / "features.metrics.json"
    second, other = placed("--features", file, "--rule", "none", capsys=capsys)
    assert second == tmp_path / "features.metrics-2.json" and other != plain
    third, ranked = placed("--features", file, "--rerank", "4,2,0.3", capsys=capsys)
    assert third == tmp_path / "features.metrics-3.json" and "rerank" in ranked
    assert json.loads(first.read_text()) == plain
    for flags, path in (([], first), (["--rule", "none"], second), (["--rerank", "4,2,0.3"], third)):
        assert placed("--features", file, *flags, capsys=capsys)[0] == path  # Done again, it finds its own.
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["metrics.json"]
    assert (tmp_path / "here" / "metrics.json").read_text() == "{}"
    first.write_bytes(b"\0" * 10)  # Torn: nothing is lost by writing it anew.
    assert placed("--features", file, capsys=capsys) == (first, plain)


def test_each_kind_of_thing_evaluated_has_its_place(tmp_path):
    (tmp_path / "run.v2").mkdir()
    assert default_place(str(tmp_path / "run.v2")) == f"{tmp_path}/run.v2/evaluation.json"
    assert default_place("memory://runs/one") == "memory://runs/one/evaluation.json"
    assert default_place("runs/one/model.safetensors") == "runs/one/model.metrics.json"
    assert default_place("s3://bucket/ViT-B-16_60.pth") == "s3://bucket/ViT-B-16_60.metrics.json"
    assert default_place("query.npz") == "query.metrics.json"
    (tmp_path / "query.parquet").mkdir()
    assert default_place(f"{tmp_path}/query.parquet/") == f"{tmp_path}/query.metrics.json"


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    file = features_file(tmp_path / "features.npz", random_pair(9, 40))

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(storage, "require_writable", refuse)
    with pytest.raises(SystemExit):
        evaluate.main(["--features", str(file), "--out", str(tmp_path / "x.json")])
    assert f"--out cannot be written: {tmp_path}/x.json: permission denied" in capsys.readouterr().err


# --- weights know what they were trained on


def test_a_run_is_evaluated_with_its_own_settings_and_no_word(run, own_metrics, capsys):
    """Figures beside the weights, not over the run's own metrics."""
    before = (run.folder / "metrics.json").read_bytes()
    evaluate.main(["--weights", str(run.folder)])
    printed = capsys.readouterr()
    assert not printed.err and f"metrics: {run.folder}/evaluation.json" in printed.out
    assert json.loads((run.folder / "evaluation.json").read_text()) == own_metrics
    assert (run.folder / "metrics.json").read_bytes() == before


def test_a_file_of_weights_alone_says_its_settings(run, own_metrics, tmp_path, monkeypatch, capsys):
    """Also elsewhere, and where the file of the architecture is gone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((run.folder / "model.safetensors").read_bytes())
    evaluate.main(["--weights", "model.safetensors"])
    assert not capsys.readouterr().err
    assert json.loads((tmp_path / "model.metrics.json").read_text()) == own_metrics
    monkeypatch.setattr("cluster.evaluation.find_weights.shipped_file", lambda arch: "gone.json")
    with open_weights("model.safetensors") as weights:
        weights.check(weights.trained.config([]), None, FEATURES)
        with pytest.raises(ConfigError, match=r"model.image_size is \[32, 32\] in the weights, \[64, 32\]"):
            weights.check(weights.trained.config(["model.image_size=64x32"]), None, FEATURES)


def test_a_card_has_no_password_and_nothing_of_how_the_work_was_shared(run):
    config = load_config(run.folder / "config.yaml", ["data.shards=http://user:secret@host/set", "run.dir=/x/y"])
    index = SimpleNamespace(name="set", fingerprint="f")
    facts = json.dumps(training_facts(config, index))
    assert "secret" not in facts and "http://host/set" in facts
    assert all(word not in facts for word in ("cluster", "checkpoint", "/x/y", "loaders", 'pretrained": "o'))


def test_another_dataset_and_other_settings_are_noted_in_one_line(run, tiny_shards, tmp_path, capsys):
    images, shards = tmp_path / "images", tmp_path / "others"
    launch("pack.py", "render", "--out", images, "--identities", 12, "--cameras", 4, "--images", 4, "--seed", 9)
    launch("pack.py", "build", "--dataset", "veri776", "--root", images, "--out", shards)
    for config in ([], run.config):
        changes = [f"data.shards={shards}", "eval.rule=none", "eval.rerank=null", "model.sie=camera"]
        evaluated(*config, "--weights", run.folder, *changes, out=tmp_path / "m.json")
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"note: data.shards is veri776 ({shards}) here, {run.folder} was trained on veri776 (")
        assert str(tiny_shards) in line and f"eval.rule is none here, {run.folder} was evaluated by camera" in line
        assert "eval.rerank is None here" in line and "eval.descriptor" not in line
    moved = tmp_path / "moved"
    shutil.copytree(tiny_shards, moved)
    extracted("--weights", run.folder, "--split", "query", f"data.shards={moved}", out=tmp_path / "q.npz")
    assert not capsys.readouterr().err  # The same dataset, wherever it lies.


def older(run, folder):
    """The run as an older version left it: its card knows neither dataset nor settings."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "evaluation*"))
    file = run.folder / "model.safetensors"
    card = replace(read_card(file), training={})
    save_model(folder / file.name, load_models(file), card)


def test_an_older_run_knows_its_settings_by_its_folder(run, own_metrics, tiny_shards, tmp_path, capsys):
    older(run, tmp_path / "old")
    assert evaluated("--weights", tmp_path / "old", out=tmp_path / "m.json") == own_metrics
    file = tmp_path / "old" / "model.safetensors"
    assert evaluated("--weights", file, out=tmp_path / "m.json") == own_metrics
    assert not capsys.readouterr().err
    shutil.copytree(tiny_shards, tmp_path / "moved")
    extracted(
        "--weights", tmp_path / "old", "--split", "query", f"data.shards={tmp_path}/moved", out=tmp_path / "q.npz"
    )
    assert f"was trained on {tiny_shards}" in capsys.readouterr().err  # All that it says of its dataset.
    file.rename(tmp_path / "alone.safetensors")
    with pytest.raises(ConfigError, match="--config: not given, and .*alone.safetensors does not say what it was tr"):
        evaluate.main(["--weights", str(tmp_path / "alone.safetensors")])


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"data: {shards: a", b"\xff\xfe", b"[]", b"3"])
def test_torn_settings_of_a_run_are_named_where_its_card_has_none(run, content, tmp_path):
    older(run, tmp_path / "old")
    (tmp_path / "old" / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.yaml|does not say|data.shards: not given") as caught:
        evaluate.main(["--weights", str(tmp_path / "old")])
    assert len(str(caught.value).splitlines()) == 1


def test_figures_of_a_run_need_no_settings(run, tmp_path):
    figures.main(["--weights", str(run.folder), "--out", str(tmp_path / "pictures"), "--figure", "ranked"])
    assert (tmp_path / "pictures" / "ranked.png").exists()


MISTAKES = """
import sys
from launch import cli, evaluate, extract

def told(main, line):
    sys.argv = ["", *line.split()]
    try:
        return cli.run(main)
    except SystemExit as exit:
        return exit.code

config = "--config configs/demo.yaml"
codes = [
    told(evaluate.main, "--features none.npz"),
    told(evaluate.main, f"{config} --weights none"),
    told(evaluate.main, f"{config} --weights RUN model.image_size=[64,32] data.shards=SHARDS"),
    told(extract.main, f"{config} --weights RUN --split nope --out x.npz data.shards=SHARDS"),
    told(extract.main, f"{config} --weights RUN --images nowhere --out x.npz"),
    told(extract.main, f"{config} --weights RUN --out x.npz"),
]
heavy = [name for name in ("torch", "ray", "open_clip") if name in sys.modules]
sys.exit(f"{codes} {heavy}" if codes != [2] * 6 or heavy else 0)
"""


def test_mistakes_are_told_in_one_line_each_before_torch_is_imported(run, tiny_shards):
    script = MISTAKES.replace("RUN", str(run.folder)).replace("SHARDS", str(tiny_shards))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    assert len([line for line in told if line.startswith("error: ")]) == len(told) >= 6
    for words in ("none.npz: no such file", "no images in split nope, only in train", "nowhere: no such folder"):
        assert any(words in line for line in told), words
