"""extract.py on several workers and into folders of parts, the mean with the mirror image, and what is refused."""

import json
import subprocess
import threading
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from clipreid.augment import normalise
from clipreid.model.arch import check_arch
from clipreid.weights.initial import build_models
from cluster.errors import ConfigError
from cluster.evaluation import feature_parts, features
from cluster.evaluation.evaluate import encode_split
from cluster.evaluation.evaluate import evaluate as evaluate_in_team
from cluster.evaluation.feature_file import read_pair, write_features
from cluster.evaluation.features import PassSettings
from cluster.ranks.team import Team
from cluster.settings.model_spec import model_spec
from cluster.settings.yaml_file import load_config
from cluster.training.worker import Run
from launch import evaluate, extract
from shards.errors import DataError
from shards.loading.folder_images import FolderImages
from shards.loading.index import ShardIndex
from shards.loading.sequential import SequentialLoader
from shards.loading.tar_images import TarImages
from tests.helpers.golden_models import ROOT_CONFIGS, clip_state
from tests.helpers.processes import on_processes
from tests.helpers.runs import BIN, ROOT, config_file, environment, overrides
from tests.helpers.tolerances import close


@pytest.fixture(scope="module")
def arguments(tiny_shards, tmp_path_factory):
    """CLIP weights in a file, and what applies them to the tiny dataset in batches that do not divide its splits."""
    folder = tmp_path_factory.mktemp("extract")
    torch.save(clip_state(check_arch(str(ROOT_CONFIGS / "tiny_vit.json"))), folder / "clip.pt")
    settings = overrides(tiny_shards, folder / "run", eval__batch=5, eval__rerank="[4,2,0.3]")
    return ["--config", str(config_file(folder)), "--weights", str(folder / "clip.pt"), *settings]


def extracted(*arguments, out):
    extract.main([*map(str, arguments), "--out", str(out)])
    return read(out)


def read(out):
    if out.is_dir():
        return feature_parts.read_parts(out)
    with np.load(out) as file:
        return {name: file[name] for name in file.files}


def on_workers(count, script, *arguments):
    """The entry point as torchrun starts it; what it printed."""
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node", count, ROOT / "launch" / script, *arguments]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, values in ours.items():
        assert np.array_equal(values, theirs[name]) and values.dtype.kind == theirs[name].dtype.kind, name


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """The gallery's features from one process."""
    return extracted(*arguments, "--split", "gallery", out=tmp_path_factory.mktemp("alone") / "gallery.npz")


@pytest.mark.parametrize(("count", "name"), [(2, "gallery.npz"), (4, "gallery.parquet")])
def test_any_number_of_workers_writes_bitwise_the_same_features(count, name, arguments, alone, tiny_shards, tmp_path):
    printed = on_workers(count, "extract.py", *arguments, "--split", "gallery", "--out", tmp_path / name)
    assert printed.splitlines() == [f"{tmp_path / name}: {len(alone['keys'])} images x 48 values"]
    ours = read(tmp_path / name)
    assert_same(ours, alone)
    assert ours["keys"].tolist() == ShardIndex.open(str(tiny_shards)).split("gallery").keys.tolist()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_images_of_every_format_are_described_and_what_is_left_out_is_named(arguments, tmp_path, capsys):
    kinds = {"a.bmp": "BMP", "b.tif": "TIFF", "c.gif": "GIF", "d.jfif": "JPEG", "e.jpe": "JPEG", "f.jpg": "BMP"}
    (folder := tmp_path / "photos").mkdir()
    for name, kind in kinds.items():
        Image.new("RGB", (8, 8), "red").save(folder / name, kind)
    (folder / "notes.txt").write_text("x")
    arrays = extracted(*arguments, "--images", folder, out=tmp_path / "f.npz")
    assert arrays["keys"].tolist() == list(kinds)
    assert np.allclose(arrays["features"], arrays["features"][0], atol=0.05)
    assert "1 files left out, no images by names and content: notes.txt" in capsys.readouterr().out
    (folder / "g.jpg").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"g.jpg: can't be read as an image \(an HTML page"):
        extracted(*arguments, "--images", folder, out=tmp_path / "g.npz")


def test_two_workers_evaluate_and_rerank_as_one_does(arguments, tmp_path):
    evaluate.main([*arguments, "--out", str(tmp_path / "one.json")])
    on_workers(2, "evaluate.py", *arguments, "--out", tmp_path / "two.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two and one["rerank"]["mAP"] != one["mAP"]


def evaluated_features(team, arguments):
    """What evaluate.py prints on each rank that torchrun started."""
    with redirect_stdout(StringIO()) as printed, patch("torch.distributed.destroy_process_group"):
        evaluate.main(arguments)
    return printed.getvalue()


@pytest.mark.parametrize(
    "protocol", [["--rerank", "4,2,0.3", "--rule", "none", "--per-query", "Q"], ["--protocol", "vehicleid"]]
)
def test_workers_share_a_feature_file_and_tell_the_metrics_once(protocol, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "features": rng.standard_normal((1500, 6)),
        "identities": rng.integers(0, 40, 1500),
        "lists": np.full(1500, "800"),
    }
    np.savez(tmp_path / "one.npz", **arrays)
    files = [str(tmp_path / "one.npz")] * (1 if "vehicleid" in protocol else 2)
    protocol = [str(tmp_path / "queries.csv") if word == "Q" else word for word in protocol]
    found = []
    for ranks in (1, 2):
        printed = on_processes(
            ranks, evaluated_features, ["--features", *files, *protocol, "--out", str(tmp_path / "m.json")]
        )
        assert [text.count("metrics:") for text in printed] == [1] + [0] * (ranks - 1)
        assert not any(printed[1:])
        found.append({path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix != ".npz"})
    assert found[0] == found[1] and len(found[0]) == len(files)


def threaded_evaluation(team, threads, arguments):
    """The gallery's features and all metrics on each rank, which has that many threads."""
    torch.set_num_threads(threads)
    model, index, config = applied(arguments)
    seen = encode_split(model, index, "gallery", config, team)
    return np.array(seen), evaluate_in_team(model, index, config, team)


def applied(arguments):
    config = load_config(arguments[1], arguments[4:])
    index = ShardIndex.open(config.data.shards)
    return build_models(model_spec(config, index), arguments[3], config.run.seed)[0].eval(), index, config


def test_features_and_metrics_do_not_depend_on_ranks_or_threads(arguments):
    settings = [*arguments, "eval.batch=32"]
    found = [
        each
        for ranks, threads in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1))
        for each in on_processes(ranks, threaded_evaluation, threads, settings)
    ]
    assert len(found) == 10 and "rerank" in found[0][1]
    for seen, metrics in found[1:]:
        assert np.array_equal(seen, found[0][0]) and metrics == found[0][1]


def test_threads_evaluate_a_compiled_encoder_as_it_was_written_and_without_gradient(arguments):
    """What compiles for training has static shapes, and neither this choice nor grad mode may end at a thread."""
    model, index, config = applied(arguments)
    plain = encode_split(model, index, "query", config, Team())
    model.image_encoder.compile(backend="eager", dynamic=False)
    seen = []
    model.image_encoder.register_forward_hook(lambda *_: seen.append((threading.get_ident(), torch.is_grad_enabled())))
    run = SimpleNamespace(reporter=MagicMock(), model=model, index=index, config=config, team=Team())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.set_num_threads(2)
    try:
        Run.evaluate(run, "evaluate")
        with torch.compiler.set_stance("force_eager"):
            compiled = encode_split(model, index, "query", config, Team())
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(compiled, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert len({thread for thread, _ in seen}) > 1 and not any(grad for _, grad in seen)


def test_a_folder_of_parts_holds_what_the_file_holds_in_order(arguments, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_parts, "PART_ROWS", 7)
    out = tmp_path / "gallery.parquet"
    assert_same(extracted(*arguments, "--split", "gallery", out=out), alone)
    assert len(list(out.glob("part-*"))) == -(-len(alone["keys"]) // 7) > 2
    assert pq.read_table(out)["keys"].to_pylist() == alone["keys"].tolist()  # as another program reads it


def test_folders_of_parts_are_evaluated_as_files_are(arguments, tmp_path):
    metrics = []
    for ending in ("npz", "parquet"):
        files = [tmp_path / f"{split}.{ending}" for split in ("query", "gallery")]
        for file in files:
            extracted(*arguments, "--split", file.stem, out=file)
        evaluate.main(["--features", *map(str, files), "--out", str(tmp_path / "metrics.json")])
        metrics.append(json.loads((tmp_path / "metrics.json").read_text()))
    assert metrics[0] == metrics[1]


def test_vehicleid_is_evaluated_from_one_folder_of_parts(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "features": rng.standard_normal((40, 6), np.float32),
        "identities": np.repeat(np.arange(10), 4).astype(str),
        "lists": np.full(40, "800,1600"),
    }
    metrics = []
    for name in ("test.npz", "test.parquet"):
        write_features(tmp_path / name, arrays)
        protocol = ["--features", str(tmp_path / name), "--protocol", "vehicleid"]
        evaluate.main([*protocol, "--out", str(tmp_path / "metrics.json")])
        metrics.append(json.loads((tmp_path / "metrics.json").read_text()))
    assert metrics[0] == metrics[1] and list(metrics[0]) == ["small", "medium"]


def test_features_do_not_depend_on_how_many_images_a_round_holds(arguments, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "ROUND_IMAGES", 10)
    assert_same(extracted(*arguments, "--split", "gallery", out=tmp_path / "gallery.npz"), alone)


@pytest.mark.parametrize("parts", [("img", "proj"), ("pre",)])
def test_flip_describes_an_image_by_the_mean_with_its_mirror_image(parts, arguments, alone, tmp_path):
    """Features before they are normalised, so the mean of normalised ones would differ."""
    settings = [*arguments, "eval.flip=true", f"eval.descriptor=[{','.join(parts)}]"]
    ours = extracted(*settings, "--split", "gallery", out=tmp_path / "flip.npz")["features"]
    config = load_config(arguments[1], arguments[4:])
    index = ShardIndex.open(config.data.shards)
    model = build_models(model_spec(config, index), arguments[3], config.run.seed)[0].eval()
    loader = SequentialLoader(TarImages(index, "gallery", (32, 32)), rank=0, world_size=1, batch_size=1000)
    pixels = normalise(next(iter(loader)).images, config.data.pixel_mean, config.data.pixel_std)
    with torch.no_grad():
        plain, mirrored = (model.features(images, None, None) for images in (pixels, pixels.flip(3)))
    means = [(getattr(plain, part) + getattr(mirrored, part)) / 2 for part in parts]
    close(ours, F.normalize(torch.cat(means, 1)), rtol=1e-7, atol=1e-6)
    assert np.abs(ours - alone["features"]).max() > 1e-3 if parts == ("img", "proj") else True


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        ("mkdir", "there.parquet", "there.parquet: is there already; remove it"),
        ("touch", "there.parquet", "there.parquet: is there already; remove it"),
        ("mkdir", "there.npz", "there.npz: is a folder; name a file in it"),
        (None, "nowhere/out.parquet", "nowhere/out.parquet: no such folder"),
    ],
)
def test_a_place_that_is_taken_is_refused_before_any_work(make, name, reason, tmp_path, capsys):
    out = tmp_path / name
    if make:
        getattr(out, make)()
    with pytest.raises(SystemExit) as caught:
        extract.main(["--config", "none.yaml", "--weights", "none", "--split", "query", "--out", str(out)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and reason in error and error.startswith("error: ") and error.count("\n") == 1


def test_an_empty_cell_of_a_part_is_unknown(tmp_path):
    """Not the text None, which would be one identity, nor a number of its own."""
    columns = {
        "features": pa.FixedSizeListArray.from_arrays(pa.array(np.ones(12, np.float32)), 3),
        "identities": pa.array(["a", None, None, "b"]),
        "cameras": pa.array([0, None, 2, None]),
        "times": pa.array([None, None, None, None]),
    }
    (tmp_path / "query.parquet").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "query.parquet" / "part-00000.parquet")
    part = read_pair([str(tmp_path / "query.parquet")] * 2, "camera_time")[0]
    assert part.identities.tolist() == ["a", "", "", "b"] and part.times.tolist() == [""] * 4
    assert part.cameras.tolist() == [0, -1, 2, -1]


def test_a_folder_that_holds_no_features_is_refused(tmp_path):
    def refused(reason, name="query.parquet"):
        with pytest.raises(ConfigError, match=reason) as caught:
            read_pair([str(tmp_path / name), str(tmp_path / name)], "none")
        assert "\n" not in str(caught.value)

    refused("query.parquet: holds no files .*.parquet")
    arrays = {"features": np.ones((4, 3), np.float32), "identities": np.arange(4)}
    write_features(tmp_path / "query.parquet", arrays)
    whole = (tmp_path / "query.parquet" / "part-00000.parquet").read_bytes()
    (tmp_path / "query.parquet" / "part-00001.parquet").write_bytes(whole[:-20])
    refused("part-00001.parquet: is not a complete Parquet file")
    write_features(tmp_path / "other.parquet", arrays | {"features": np.ones((4, 2), np.float32)})
    other = tmp_path / "other.parquet" / "part-00000.parquet"
    other.rename(tmp_path / "query.parquet" / "part-00001.parquet")
    refused("part-00001.parquet: has other columns than part-00000.parquet")
    write_features(tmp_path / "bare.parquet", {"features": np.ones((4, 3), np.float32)})
    refused("bare.parquet: lacks identities; it holds features", "bare.parquet")


def one_image_and_a_broken_one(team, folder, shards):
    """What each rank gets of a folder with one image, and what it makes of an image that rank 1 cannot read."""

    def encode(images, rows):
        if len(rows) == 5 and team.rank == 1:
            raise DataError("shard x, key y: can't be decoded")
        return images.float().mean((2, 3))

    rows = features.extract_images(encode, FolderImages(folder, ["red.png"], (8, 8)), team, PassSettings((8, 8), 3))
    try:
        features.extract(encode, ShardIndex.open(shards), "train", team, PassSettings((8, 8), 5))
    except DataError as error:
        return np.array(rows).tolist(), str(error)


def mapping_of_the_bank(team, shards):
    """(device, inode) of the file behind this rank's features."""
    index, settings = ShardIndex.open(shards), PassSettings((8, 8), batch_size=5)
    bank = features.extract(lambda images, rows: images.float().mean((2, 3)), index, "train", team, settings)
    address = bank.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, _, _, device, inode, *_ = line.split()
        first, last = (int(end, 16) for end in extent.split("-"))
        if first <= address < last:
            return device, int(inode)


def test_workers_of_a_node_hold_features_once(tiny_shards):
    """Both map the same file; memory of a process's own has inode 0."""
    first, second = on_processes(2, mapping_of_the_bank, str(tiny_shards))
    assert first == second and first[1] != 0


def test_a_rank_may_have_no_image_and_an_image_that_cannot_be_read_ends_all_ranks(tiny_shards, tmp_path, monkeypatch):
    Image.new("RGB", (9, 9), (200, 10, 0)).save(tmp_path / "red.png")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    told = on_processes(2, one_image_and_a_broken_one, str(tmp_path), str(tiny_shards))
    assert told == [([[200, 10, 0]], "shard x, key y: can't be decoded")] * 2
    assert not list(tmp_path.glob("features-*"))
