"""Packing: the same bytes whatever happens, nothing lost, nothing half done, every mistake in one line."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from itertools import groupby
from pathlib import Path

import fsspec
import pytest
import webdataset
from PIL import Image

from launch.cli import run
from shards import storage
from shards.dataset_file import read_dataset_json
from shards.errors import DataError
from shards.format import make_key
from shards.index_table import read_index_table
from shards.loading.index import ShardIndex
from shards.packing.build import build
from shards.packing.contact_sheet import write_sheet
from shards.packing.overview import Overview
from shards.packing.processes import run_tasks
from shards.packing.verify import verify
from shards.progress import silent
from tests.helpers.damage import RUBBISH, TORN, Disk, flips
from tests.helpers.layouts import image_bytes, make_duke, make_manifest, make_market, make_vehicleid, tree_bytes, write

ROOT = Path(__file__).resolve().parents[3]
NOISE = {"width": 200, "height": 200}  # about 40 kB each, so that a few make a 1 MB shard


def pack(table, out, **settings):
    return build("manifest", [str(table)], str(out), **({"processes": 1, "shard_mb": 1} | settings))


def command(*arguments, **settings):
    """launch/pack.py in a process of its own."""
    line = [sys.executable, str(ROOT / "launch" / "pack.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, **settings)


def start(*arguments):
    """launch/pack.py in a process of its own, as soon as it begins its work."""
    script = "import sys, shards.packing.build, launch.pack; print('go', flush=True); launch.pack.main(sys.argv[1:])"
    line = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"go\n"
    return process


def fails(pattern, table, out, **settings):
    with pytest.raises(DataError, match=pattern) as caught:
        pack(table, out, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Images for several shards, and the folder that an undisturbed build makes of them."""
    root = tmp_path_factory.mktemp("large")
    table = make_manifest(root, train=16, tested=4, images=6, size=NOISE)
    report = pack(table, root / "packed")
    assert report.dataset["splits"]["train"]["shards"] >= 4
    return table, root / "packed"


def index_rows(out):
    return read_index_table(str(out)).to_pylist()


def test_one_and_two_processes_write_the_same_bytes(large, tmp_path):
    table, packed = large
    pack(table, tmp_path / "two", processes=2)
    assert tree_bytes(tmp_path / "two") == tree_bytes(packed)


def test_the_index_finds_every_original_image_and_nothing_else(large):
    table, packed = large
    rows = index_rows(packed)
    sources = [line.split(",") for line in table.read_text().splitlines()[1:]]
    assert sorted((r["key"], r["split"], r["identity"], r["camera"]) for r in rows) == sorted(
        (make_key(path), split, identity, int(camera)) for path, identity, split, camera in sources
    )
    originals = {make_key(path): (table.parent / path).read_bytes() for path, *_ in sources}
    for row in rows:
        with (packed / row["shard"]).open("rb") as file:
            file.seek(row["offset"])
            data = file.read(row["size"])
        assert data == originals[row["key"]]
        assert row["crc32"] == zlib.crc32(data)
        assert (row["width"], row["height"]) == (200, 200)


def test_labels_follow_the_sorted_training_identities(large):
    _, packed = large
    rows = index_rows(packed)
    identities = sorted({r["identity"] for r in rows if r["split"] == "train"})
    for row in rows:
        assert row["label"] == (identities.index(row["identity"]) if row["split"] == "train" else -1)


def test_identities_are_contiguous_and_stay_in_one_training_shard(large):
    _, packed = large
    rows = [r for r in index_rows(packed) if r["split"] == "train"]
    runs = [name for name, _ in groupby(rows, key=lambda r: (r["identity"], r["shard"]))]
    assert len(runs) == len({r["identity"] for r in rows})
    for name in {r["shard"] for r in rows}:
        assert (packed / name).stat().st_size <= (1 << 20) + 2048


def test_index_order_is_tar_order(large):
    _, packed = large
    rows = index_rows(packed)
    places = [(("train", "query", "gallery").index(r["split"]), r["shard"], r["offset"]) for r in rows]
    assert places == sorted(places)


def test_plain_tar_and_plain_webdataset_read_the_shards(large):
    import webdataset

    _, packed = large
    rows = [r for r in index_rows(packed) if r["shard"] == "train-000001.tar"]
    listed = subprocess.run(["tar", "tf", packed / "train-000001.tar"], capture_output=True, text=True, check=True)
    names = [name for r in rows for name in (f"{r['key']}.jpg", f"{r['key']}.json")]
    assert listed.stdout.split() == names
    samples = list(webdataset.WebDataset(str(packed / "train-000001.tar"), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [r["key"] for r in rows]
    for sample, row in zip(samples, rows, strict=True):
        assert zlib.crc32(sample["jpg"]) == row["crc32"]
        facts = json.loads(sample["json"])
        assert {name: facts[name] for name in ("identity", "label", "camera", "view", "time")} == {
            name: row[name] for name in ("identity", "label", "camera", "view", "time")
        }
        assert make_key(facts["path"]) == row["key"]


def test_long_and_foreign_names_survive_in_tar_and_json(tmp_path):
    folder = "a-rather-long-folder-name/" * 5 + "Straße"
    rows = "".join(f"{folder}/{n}.jpg,x,{split}\n" for n, split in enumerate(("train", "query", "gallery")))
    write(tmp_path / "m.csv", f"path,identity,split\n{rows}")
    for number in range(3):
        write(tmp_path / folder / f"{number}.jpg", image_bytes(number))
    pack(tmp_path / "m.csv", tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        image, facts = tar.getmembers()
        assert image.name == make_key(f"{folder}/0.jpg") + ".jpg" and len(image.name) > 100 and "Straße_0" in image.name
        assert json.load(tar.extractfile(facts))["path"] == f"{folder}/0.jpg"


def test_ten_kills_at_random_moments_end_in_the_same_bytes(tmp_path):
    table = make_manifest(tmp_path, train=200, tested=30, images=4)
    line = ["build", "--dataset", "manifest", "--root", table, "--shard-mb", 1]
    lasts_s = {}
    for processes in (1, 2):
        process, begun = (
            start(*line, "--out", tmp_path / f"whole{processes}", "--processes", processes),
            time.monotonic(),
        )
        assert process.wait() == 0
        lasts_s[processes] = time.monotonic() - begun
    expected = tree_bytes(tmp_path / "whole1")
    assert tree_bytes(tmp_path / "whole2") == expected
    rng, out, kills = random.Random(4), tmp_path / "out", 0
    while kills < 10:
        processes = 1 + kills % 2
        process = start(*line, "--out", out, "--processes", processes)
        time.sleep(rng.uniform(0, lasts_s[processes]))
        process.send_signal(signal.SIGKILL)
        process.wait()
        too_late = (out / "dataset.json").exists()
        kills += not too_late
        if too_late or kills % 2 == 0:  # so some builds are killed twice
            pack(table, out)
            assert tree_bytes(out) == expected
            shutil.rmtree(out)


class Crash(BaseException):
    """Ends a build where it stands, as a kill would."""


def test_a_crash_before_or_after_any_file_gets_its_name_ends_in_the_same_bytes(large, tmp_path, monkeypatch):
    table, packed = large
    replace, renames = Path.replace, 0
    while True:
        calls = 0

        def crash(self, target, at=renames):
            nonlocal calls
            calls += 1
            if calls == at // 2 + 1:
                if at % 2:
                    replace(self, target)
                raise Crash
            return replace(self, target)

        out = tmp_path / str(renames)
        monkeypatch.setattr(Path, "replace", crash)
        try:
            pack(table, out)
        except Crash:
            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", replace)
                pack(table, out)
            assert tree_bytes(out) == tree_bytes(packed)
            renames += 1
            continue
        break
    shards = sum(split["shards"] for split in read_dataset_json(str(packed))["splits"].values())
    # Rows and tar of each shard, the index, README.md, dataset.json; before and after.
    assert renames == 2 * (2 * shards + 3)


def note_and_sleep(folder, advance):
    """A task that says which process it runs in, and lasts."""
    write(Path(folder) / str(os.getpid()), "")
    time.sleep(60)


def test_processes_die_with_the_one_that_started_them(tmp_path):
    script = f"""
import shards.packing.processes
from tests.shards.packing.test_pack import note_and_sleep
if __name__ == "__main__":
    list(shards.packing.processes.run_tasks(note_and_sleep, [{str(tmp_path)!r}] * 2, 2, print, 2))
"""
    write(tmp_path / "script" / "main.py", script)
    command = [sys.executable, str(tmp_path / "script" / "main.py")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    pids = wait_for(lambda: [int(p.name) for p in tmp_path.glob("[0-9]*")], until=lambda pids: len(pids) == 2)
    process.kill()
    process.wait()
    wait_for(lambda: [pid for pid in pids if is_running(pid)], until=lambda running: not running)


def wait_for(look, until, timeout_s=30.0):
    """What `look` sees as soon as it is as it should be."""
    deadline = time.monotonic() + timeout_s
    while not until(seen := look()):
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)
    return seen


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_itself(task, advance):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error_with_a_remedy():
    with pytest.raises(DataError, match="a process was killed .* fewer --processes"):
        list(run_tasks(kill_itself, [1, 2], 2, silent, 2))


def test_a_power_loss_at_any_moment_ends_in_the_same_bytes(tmp_path):
    """Whatever it leaves of the files that were not flushed to the disk; and nothing once the build has ended."""
    table = make_manifest(tmp_path, train=2, tested=1, images=1)
    pack(table, tmp_path / "whole")
    expected = tree_bytes(tmp_path / "whole")
    (tmp_path / "out").mkdir()
    with Disk(tmp_path / "out").watched() as disk:
        pack(table, tmp_path / "out")
        disk.safe = "packed"
    tried = 0
    for safe, folder in disk.outcomes(tmp_path / "after"):
        whole = {name: data for name, data in tree_bytes(folder).items() if not name.startswith(".partial/")}
        assert safe is None or whole == expected
        pack(table, folder)
        assert tree_bytes(folder) == expected
        tried += 1
    assert tried > 20


def interrupted(table, out):
    """A build that ended when all shards were written."""

    def stop(done, total):
        if done == total:
            raise Crash

    with pytest.raises(Crash):
        pack(table, out, progress=stop)
    return out / ".partial"


@pytest.mark.parametrize("tear", TORN)
def test_a_torn_shard_of_an_interrupted_build_is_written_again(large, tmp_path, tear):
    table, packed = large
    work = interrupted(table, tmp_path / "out")
    name = next(work.glob("train-*.json")).with_suffix(".tar").name
    shard = tmp_path / "out" / name
    shard.write_bytes(TORN[tear](shard.read_bytes()))
    pack(table, tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == tree_bytes(packed)


def test_rows_with_another_bit_or_rubbish_in_them_are_made_again(tmp_path):
    table = make_manifest(tmp_path, train=2, tested=1, images=1)
    pack(table, tmp_path / "whole")
    interrupted(table, tmp_path / "left")
    rows = next((tmp_path / "left" / ".partial").glob("*.json"))
    content = rows.read_bytes()
    for number, changed in enumerate([*flips(content, 50), *RUBBISH, b'{"signature": "x", "unknown": 1}']):
        out = tmp_path / str(number)
        shutil.copytree(tmp_path / "left", out)
        (out / ".partial" / rows.name).write_bytes(changed)
        pack(table, out)
        assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_a_foreign_file_in_the_work_folder_is_left_alone(large, tmp_path):
    table, packed = large
    foreign = interrupted(table, tmp_path / "out") / "notes.txt"
    foreign.write_text("precious")
    pack(table, tmp_path / "out")
    assert foreign.read_text() == "precious"
    assert pack(table, tmp_path / "out").images_written == 0
    shutil.rmtree(foreign.parent)
    assert tree_bytes(tmp_path / "out") == tree_bytes(packed)


def test_a_finished_dataset_with_a_file_cut_short_is_not_called_packed(large, tmp_path):
    table, packed = large
    shutil.copytree(packed, tmp_path / "out")
    shard = tmp_path / "out" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    fails("train-000001.tar cut short: delete that folder, then repeat", table, tmp_path / "out")


def test_finished_shards_are_not_written_again(large, tmp_path):
    table, packed = large

    def stop(done, total):
        if done > total / 2:
            raise Crash

    with pytest.raises(Crash):
        pack(table, tmp_path / "out", progress=stop)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert kept
    report = pack(table, tmp_path / "out")
    assert report.shards_kept == len(kept)
    assert 0 < report.images_written < sum(s["images"] for s in report.dataset["splits"].values())
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == when for name, when in kept.items())
    assert tree_bytes(tmp_path / "out") == tree_bytes(packed)


def test_what_an_interrupted_build_with_other_options_left_is_replaced(large, tmp_path):
    table, packed = large

    def stop(done, total):
        if done == total:
            raise Crash

    with pytest.raises(Crash):
        pack(table, tmp_path / "out", shard_mb=2, progress=stop)
    pack(table, tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == tree_bytes(packed)


def test_readers_never_see_half_a_dataset(large, tmp_path):
    table, _ = large
    seen = 0

    def look(done, total):
        nonlocal seen
        seen += 1
        with pytest.raises(DataError, match="no packed dataset"):
            read_dataset_json(str(tmp_path / "out"))
        for path in (tmp_path / "out").glob("*.tar"):
            with tarfile.open(path) as tar:
                assert len(tar.getmembers()) % 2 == 0
            assert path.read_bytes().endswith(bytes(1024))

    pack(table, tmp_path / "out", progress=look)
    assert seen > 4


def test_a_second_call_finds_everything_there(large):
    table, packed = large
    before = {path: path.stat().st_mtime_ns for path in packed.iterdir()}
    report = pack(table, packed)
    assert report.images_written == 0
    assert {path: path.stat().st_mtime_ns for path in packed.iterdir()} == before


def test_an_output_folder_with_something_else_is_refused(large, tmp_path):
    table, packed = large
    before = tree_bytes(packed)
    fails(r"other options \(shard_mb 1 there, 64 asked\): give another --out", table, packed, shard_mb=64)
    fails(r"noun object there, bird asked", table, packed, noun="bird")
    other = make_manifest(tmp_path, train=3)
    fails("the source has changed", other, packed)
    write(tmp_path / "full" / "thesis.txt", "precious")
    fails("holds other files .thesis.txt.: give a new or empty folder", table, tmp_path / "full")
    assert tree_bytes(packed) == before


def test_unreadable_images_are_all_named_and_nothing_is_published(tmp_path):
    table = make_manifest(tmp_path)
    whole = image_bytes(1000, **NOISE)
    faults = {"0000/00": b"", "0001/01": b"not an image", "0002/02": whole[: len(whole) // 2]}
    good = {name: (tmp_path / "crops" / f"{name}.jpg").read_bytes() for name in faults}
    for name, data in faults.items():
        write(tmp_path / "crops" / f"{name}.jpg", data)
    message = fails("3 images cannot be read", table, tmp_path / "out")
    assert all(name in message for name in faults)
    with pytest.raises(DataError):
        read_dataset_json(str(tmp_path / "out"))
    for name, data in good.items():
        write(tmp_path / "crops" / f"{name}.jpg", data)
    assert pack(table, tmp_path / "out").shards_kept == 2  # query and gallery


def test_missing_images_are_named_before_anything_is_written(tmp_path):
    table = make_manifest(tmp_path)
    (tmp_path / "crops" / "0001" / "02.jpg").unlink()
    fails("1 images are not there: crops/0001/02.jpg", table, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_png_and_webp_keep_their_bytes_and_a_wrong_ending_is_put_right(tmp_path):
    kinds = {"a.png": "PNG", "b.webp": "WEBP", "c.jpeg": "JPEG", "d.jpg": "PNG"}
    splits = dict(zip(kinds, ("train", "query", "gallery", "train"), strict=True))
    for name, kind in kinds.items():
        write(tmp_path / name, image_bytes(7, kind=kind))
    rows = "".join(f"{name},{split},{split}\n" for name, split in splits.items())
    write(tmp_path / "m.csv", f"path,identity,split\n{rows}")
    pack(tmp_path / "m.csv", tmp_path / "out")
    found = {}
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar if not member.name.endswith("json")}
    assert found == {
        "a.png": image_bytes(7, kind="PNG"),
        "b.webp": image_bytes(7, kind="WEBP"),
        "c.jpg": image_bytes(7, kind="JPEG"),
        "d.png": image_bytes(7, kind="PNG"),
    }


def test_resize_stores_jpegs_of_that_size_and_says_so(tmp_path):
    table = make_manifest(tmp_path, size=NOISE)
    fails("--quality only applies to resized images", table, tmp_path / "out", quality=80)
    report = pack(table, tmp_path / "out", resize=(64, 32), quality=80)
    assert report.dataset["options"] == {"shard_mb": 1, "resize": [64, 32], "quality": 80}
    row = index_rows(tmp_path / "out")[0]
    data = (tmp_path / "out" / row["shard"]).read_bytes()[row["offset"] :][: row["size"]]
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size, row["width"], row["height"]) == ("JPEG", (32, 64), 32, 64)
    better = pack(table, tmp_path / "better", resize=(64, 32))
    assert better.dataset["fingerprint"] != report.dataset["fingerprint"]


def test_the_fingerprint_follows_content_and_not_shards(tmp_path):
    table = make_manifest(tmp_path, size=NOISE)
    first = pack(table, tmp_path / "a").dataset["fingerprint"]
    assert pack(table, tmp_path / "b", shard_mb=64).dataset["fingerprint"] == first
    assert pack(table, tmp_path / "c", noun="bird").dataset["fingerprint"] != first
    image = tmp_path / "crops" / "0000" / "00.jpg"
    write(image, image_bytes(99, **NOISE))
    assert pack(table, tmp_path / "d").dataset["fingerprint"] != first


def write_rows(root, rows):
    """A manifest of (identity, split, camera) rows, an image each."""
    lines = []
    for number, (identity, split, camera) in enumerate(rows):
        write(root / f"{number}.jpg", image_bytes(number))
        lines.append(f"{number}.jpg,{identity},{split},{camera}\n")
    write(root / "m.csv", "path,identity,split,camera\n" + "".join(lines))
    return root / "m.csv"


CLEAN = [("a", "train", 0), ("a", "train", 1), ("b", "query", 0), ("b", "gallery", 1)]


@pytest.mark.parametrize(
    ("rows", "warning"),
    [
        ([("c", "train", 0)], "1 of 2 training identities have one image only: c"),
        ([("a", "gallery", 0)], "1 identities are in both train and test: a"),
        ([("c", "query", 0)], "1 of 2 queries have no valid gallery match (1: identity not in the gallery; 0: there"),
        ([("b", "query", 1)], "1 of 2 queries have no valid gallery match (0: identity not in the gallery; 1: there"),
        ([("b", "query", "")], ""),  # an unknown camera equals none, not even another unknown one
    ],
)
def test_what_looks_wrong_is_a_warning_and_an_error_when_strict(rows, warning, tmp_path):
    table = write_rows(tmp_path, CLEAN + rows)
    report = pack(table, tmp_path / "out")
    assert len(report.warnings) == bool(warning) and "".join(report.warnings).startswith(warning)
    if warning:
        fails("--strict, and there are 1 warnings: " + re.escape(warning), table, tmp_path / "strict", strict=True)
        assert not (tmp_path / "strict").exists()
    else:
        pack(table, tmp_path / "strict", strict=True)


def test_without_cameras_no_query_is_lost_to_the_camera_rule(tmp_path):
    rows = [(identity, split, "") for identity, split, _ in CLEAN]
    assert pack(write_rows(tmp_path, rows), tmp_path / "out").warnings == []


def keys_of(root, names):
    """Key by path of images packed as one training identity, listed in this order."""
    for number, name in enumerate(names):
        write(root / name, image_bytes(number))
    write(root / "m.csv", "path,identity,split\n" + "".join(f'"{name}",a,train\n' for name in names))
    report = pack(root / "m.csv", root / "out")
    assert verify(str(root / "out"), decode_all=True, processes=1).problems == []
    for path in (root / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            by_path = {
                json.load(tar.extractfile(member))["path"]: member.name.removesuffix(".json")
                for member in tar
                if member.name.endswith(".json")
            }
    assert sorted(by_path.values()) == sorted(row["key"] for row in index_rows(root / "out"))
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert sorted(sample["__key__"] for sample in samples) == sorted(by_path.values())
    return by_path, report


NAMES = ("张三/1.jpg", "李四/1.jpg", "Иванов_1.jpg", "Петров_1.jpg", "José.jpg", "Josè.jpg", "Jose\u0301.jpg", "की.jpg")


def test_keys_keep_the_letters_of_any_script(tmp_path):
    keys, report = keys_of(tmp_path, NAMES)
    assert keys == {name: name.removesuffix(".jpg").replace("/", "_") for name in NAMES}
    assert report.notes == []


def test_paths_that_would_give_one_key_each_get_a_short_hash_whatever_their_order(tmp_path):
    names = ("x y.jpg", "x_y.jpg", "a/1.jpg", "a/1.png", "alone.jpg", "☂.jpg", "☃.jpg")
    keys, report = keys_of(tmp_path / "one", names)
    assert keys_of(tmp_path / "two", names[::-1])[0] == keys
    assert keys["alone.jpg"] == "alone" and len(set(keys.values())) == len(names)
    for name, key in keys.items():
        if name != "alone.jpg":
            assert re.fullmatch(r"(x_y|a_1|_)-[0-9a-f]{8}", key)
    assert len(report.notes) == 1 and report.notes[0].startswith("6 keys carry a hash of the path")


def test_a_path_listed_twice_in_a_split_is_an_error(tmp_path):
    table = write_rows(tmp_path, CLEAN)
    write(table, table.read_text() + "0.jpg,a,train,0\n")
    fails(
        "split train: 0.jpg and 0.jpg both get the key 0-........: rename one, or list it once", table, tmp_path / "out"
    )


def test_vehicleid_packs_test_lists_and_attributes(tmp_path):
    report = build("vehicleid", [str(make_vehicleid(tmp_path / "v"))], str(tmp_path / "out"), processes=1)
    assert report.dataset["splits"]["test"] == {"images": 6, "identities": 3, "shards": 1}
    rows = index_rows(tmp_path / "out")
    assert {r["lists"] for r in rows if r["split"] == "test"} == {"800,1600,2400", "1600,2400", "2400"}
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        facts = json.load(tar.extractfile(tar.getmembers()[1]))
    assert facts["attributes"] == {"color": "3", "model": "41"}


def test_a_joint_dataset_is_packed_from_all_its_roots(tmp_path):
    make_market(tmp_path / "m"), make_duke(tmp_path / "d")
    roots = [str(tmp_path / "m"), str(tmp_path / "d")]
    report = build("market1501+dukemtmc", roots, str(tmp_path / "out"), processes=2)
    assert (report.dataset["name"], report.dataset["noun"], report.dataset["cameras"]) == (
        "market1501+dukemtmc",
        "person",
        14,
    )
    rows = index_rows(tmp_path / "out")
    assert {row["key"].split("_")[0] for row in rows} == {"market1501", "dukemtmc"}
    assert sorted({row["label"] for row in rows if row["split"] == "train"}) == [0, 1, 2, 3]
    assert {row["crc32"] for row in rows if row["key"].startswith("dukemtmc_query")} == {
        zlib.crc32(path.read_bytes()) for path in (tmp_path / "d" / "query").glob("0*.jpg")
    }


def test_input_and_output_may_be_fsspec_urls(tmp_path):
    make_market(tmp_path / "market")
    build("market1501", [str(tmp_path / "market")], str(tmp_path / "local"), processes=1)
    expected = tree_bytes(tmp_path / "local")
    build("market1501", [f"file://{tmp_path}/market"], f"file://{tmp_path}/file", processes=2)
    assert tree_bytes(tmp_path / "file") == expected
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/market/", "/raw", recursive=True)
    report = build("market1501", ["memory://raw"], "memory://packed", processes=2)
    assert {path.removeprefix("/packed/"): memory.cat(path) for path in memory.find("/packed")} == expected
    assert build("market1501", ["memory://raw"], "memory://packed").images_written == 0
    assert report.images_written == 9


def test_a_failed_write_leaves_no_file_under_the_name(tmp_path):
    with pytest.raises(Crash), storage.write_atomic(str(tmp_path / "a")) as file:
        file.write(b"half")
        raise Crash
    with pytest.raises(Crash), storage.write_atomic("memory://half/a") as file:
        file.write(b"half")
        raise Crash
    assert list(tmp_path.iterdir()) == []


def test_build_on_the_command_line_reports_and_never_loads_torch(tmp_path):
    table = make_manifest(tmp_path)
    code = "import runpy, sys; sys.argv[0] = 'pack.py'\ntry: runpy.run_path({!r}, run_name='__main__')\nfinally: {}"
    check = "assert not {'torch', 'ray', 'deepspeed'} & set(sys.modules)"
    script = code.format(str(ROOT / "launch" / "pack.py"), check)
    line = ["build", "--dataset", "manifest", "--root", table, "--out", tmp_path / "out", "--processes", "1"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, line)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "packed; fingerprint" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (
            ["build", "--dataset", "manifest", "--root", "no-train.csv", "--out", "out", "--strict"],
            "split train is empty",
        ),
        (["build", "--dataset", "market1501", "--root", "nowhere", "--out", "out"], "nowhere: no such folder"),
        (["build", "--dataset", "marked", "--root", ".", "--out", "out"], "dataset 'marked' is not known; known: "),
        (["build", "--dataset", "market1501", "--root", ".", "--out", "out", "--resize", "12"], "not HEIGHTxWIDTH"),
        (["build", "--dataset", "market1501", "--rot", "."], "required: --root, --out"),
        (["verify", "nowhere"], "nowhere/dataset.json: no such file, so this is no packed dataset"),
        (["inspect", "nowhere"], "nowhere/dataset.json: no such file, so this is no packed dataset"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_within_five_seconds(arguments, fault, tmp_path):
    write_rows(tmp_path, [row for row in CLEAN if row[1] != "train"]).rename(tmp_path / "no-train.csv")
    started = time.monotonic()
    done = command(*arguments, cwd=tmp_path)
    assert time.monotonic() - started < 5
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and fault in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kept", "warned"),
    [(("train",), ["query", "gallery"]), (("query", "gallery"), ["train"]), (("train", "gallery"), ["query"])],
)
def test_a_dataset_for_training_or_for_evaluation_alone_is_packed_with_a_warning(kept, warned, tmp_path):
    table = write_rows(tmp_path, [row for row in CLEAN if row[1] in kept])
    report = pack(table, tmp_path / "out")
    assert [line.split()[1] for line in report.warnings] == warned
    assert all("is empty: the dataset can't be" in line for line in report.warnings)
    fails(f"--strict, and there are {len(warned)} warnings", table, tmp_path / "strict", strict=True)
    assert verify(str(tmp_path / "out"), decode_all=True).problems == []
    assert [split.name for split in Overview.read(str(tmp_path / "out")).splits] == list(kept)
    write_sheet(str(tmp_path / "out"), tmp_path / "sheet.png")
    index = ShardIndex.open(str(tmp_path / "out"), str(tmp_path / "cache"))
    assert len(index.split(kept[0]))
    with pytest.raises(DataError, match=f"has no split '{warned[0]}'; it has: "):
        index.split(warned[0])


def test_help_shows_an_example():
    for arguments in (["--help"], ["build", "--help"]):
        done = command(*arguments)
        assert done.returncode == 0 and "python launch/pack.py build --dataset" in done.stdout
    assert "Every image is decoded" in done.stdout


def test_run_turns_mistakes_into_exit_code_2_and_keeps_faults_of_the_program(capsys):
    def raises(error):
        def main(arguments):
            raise error

        return main

    assert run(lambda arguments: None) == 0
    assert run(lambda arguments: 1) == 1
    assert run(raises(DataError("shard x: bad"))) == 2
    assert capsys.readouterr().err == "error: shard x: bad\n"
    assert run(raises(FileNotFoundError(2, "No such file or directory", "a/b"))) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and ": a/b: no such file or directory: " in told and told.count("\n") == 1
    with pytest.raises(KeyError):
        run(raises(KeyError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        run(raises(ValueError("a bug")))
