"""From which checkpoint a run goes on, and what it refuses: named ones, unusable ones, settings that change results."""

import json
import shutil

import pytest

from cluster.checks.may_continue import check_may_continue
from cluster.errors import ConfigError
from cluster.run.manifest import FOLDER, Position
from cluster.run.storage import Storage
from cluster.settings.config import results_settings
from shards.sealed import seal, unseal
from tests.helpers.checkpoints import at, damage, loaded, newest_at, plain_engine, save, settings_of, writer_at


def test_a_run_begins_from_the_named_checkpoint_and_then_goes_on_from_its_own(tmp_path):
    save(writer_at(tmp_path / "other"), 3, 7)
    older = min((tmp_path / "other" / FOLDER).iterdir())
    moved = tmp_path / "elsewhere" / "best"
    shutil.copytree(older, moved)
    for chosen in (older, moved):
        assert loaded(tmp_path / "run", str(chosen)) == (3, 3.0)
    settings = json.loads(json.dumps(results_settings(settings_of(tmp_path))))
    save(writer_at(tmp_path / "run", settings=settings), 5)
    shutil.rmtree(moved)
    assert loaded(tmp_path / "run", str(moved)) == (5, 5.0)
    check_may_continue(settings_of(tmp_path / "run", run__resume=str(moved)), "f")


def test_a_named_checkpoint_that_is_damaged_is_refused_in_one_line(tmp_path):
    save(writer_at(tmp_path / "other"), 3)
    (folder,) = (tmp_path / "other" / FOLDER).iterdir()
    name = damage(tmp_path / "other", "flipped")
    with pytest.raises(ConfigError, match=rf"^run.resume: \S+{name} does not have the hash.*another checkpoint$"):
        newest_at(tmp_path / "run", str(folder))
    (folder / "manifest.json").write_text("{")
    for refuse in (
        lambda: newest_at(tmp_path / "run", str(folder)),
        lambda: check_may_continue(settings_of(tmp_path / "run", run__resume=str(folder)), "f"),
    ):
        with pytest.raises(ConfigError, match=r"^run.resume: \S+manifest.json cannot be read.*another checkpoint$"):
            refuse()


def test_an_earlier_checkpoint_of_the_same_run_is_refused(tmp_path):
    settings = json.loads(json.dumps(results_settings(settings_of(tmp_path))))
    save(writer_at(tmp_path, settings=settings), 3, 7)
    older, newest = sorted((tmp_path / FOLDER).iterdir())
    check_may_continue(settings_of(tmp_path, run__resume=str(newest)), "f")
    with pytest.raises(ConfigError, match=rf"{older.name}/ is not the newest.*{newest.name}: choose another run.dir"):
        check_may_continue(settings_of(tmp_path, run__resume=f"{older}/"), "f")


@pytest.mark.parametrize("kind", ["flipped", "other format", "out of reach"])
def test_a_run_whose_checkpoints_cannot_be_used_does_not_begin_anew_over_them(tmp_path, kind, monkeypatch):
    save(writer_at(tmp_path), 3)
    (folder,) = (tmp_path / FOLDER).iterdir()
    manifest = folder / "manifest.json"
    if kind == "flipped":
        damage(tmp_path, kind)
    elif kind == "other format":
        manifest.write_text(json.dumps(seal(unseal(manifest.read_bytes()) | {"format": 9})))
    else:
        monkeypatch.setattr(Storage, "read", out_of_reach)
    with pytest.raises(ConfigError, match=rf"none can be used \(.*{folder.name}.*choose another run.dir, or remove"):
        newest_at(tmp_path)
    if kind != "flipped":
        with pytest.raises(ConfigError, match="none can be used"):
            check_may_continue(settings_of(tmp_path), "f")


def out_of_reach(self, name):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("kind", ["other format", "out of reach"])
def test_checkpoints_that_could_not_be_read_are_not_removed_with_the_next(tmp_path, kind, monkeypatch):
    save(writer_at(tmp_path, keep=1), 3)
    save(writer_at(tmp_path, keep=2), 7)
    newest = max((tmp_path / FOLDER).iterdir())
    with monkeypatch.context() as patch:
        if kind == "other format":
            manifest = newest / "manifest.json"
            manifest.write_text(json.dumps(seal(unseal(manifest.read_bytes()) | {"format": 9})))
        else:
            read = Storage.read
            patch.setattr(Storage, "read", lambda s, n: (out_of_reach if newest.name in s.url else read)(s, n))
        assert newest_at(tmp_path).position == at(3)
        writer = writer_at(tmp_path, keep=1)
    save(writer, 5)
    assert sorted(f.name.split("-")[1] for f in (tmp_path / FOLDER).iterdir()) == ["00000005", "00000007"]


def test_changes_that_would_change_results_are_refused_by_key_and_harmless_ones_pass(tmp_path):
    settings = json.loads(json.dumps(results_settings(settings_of(tmp_path))))
    save(writer_at(tmp_path, settings=settings), 3)
    check_may_continue(settings_of(tmp_path, stage2__epochs=99, cluster__workers=2, data__loaders=0), "f")
    with pytest.raises(ConfigError, match=r"run.seed: 5.*with 0") as caught:
        check_may_continue(settings_of(tmp_path, run__seed=5, stage2__lr=1e-3), "f")
    assert "stage2.lr" in str(caught.value)
    with pytest.raises(ConfigError, match="is dataset g, the checkpoints"):
        check_may_continue(settings_of(tmp_path), "g")
    with pytest.raises(ConfigError, match="run.resume: never, but"):
        check_may_continue(settings_of(tmp_path, run__resume="never"), "f")
    with pytest.raises(ConfigError, match="neither auto, never, nor a complete checkpoint"):
        check_may_continue(settings_of(tmp_path / "new", run__resume=str(tmp_path / "no")), "f")


def test_a_run_left_to_its_device_goes_on_in_the_precision_it_was_begun_with(tmp_path):
    settings = json.loads(json.dumps(results_settings(settings_of(tmp_path, train__precision="bf16"))))
    save(writer_at(tmp_path, settings=settings), 3)
    check_may_continue(settings_of(tmp_path), "f")
    with pytest.raises(ConfigError, match="train.precision: float32, but the checkpoints of .* were made with bf16"):
        check_may_continue(settings_of(tmp_path, train__precision="float32"), "f")


def test_epochs_may_change_where_nothing_that_is_done_depends_on_them(tmp_path):
    settings = json.loads(json.dumps(results_settings(settings_of(tmp_path))))
    writer = writer_at(tmp_path, settings=settings)
    writer.save(Position(1, 2, 1, 9, False), plain_engine(1.0))
    writer.finish()
    with pytest.raises(ConfigError, match="stage1.epochs: 60, but the checkpoints of .* were made with 120"):
        check_may_continue(settings_of(tmp_path, stage1__epochs=60), "f")
    writer.save(Position(2, 5, 1, 9, False), plain_engine(1.0))
    writer.finish()
    check_may_continue(settings_of(tmp_path, stage1__epochs=60, stage2__epochs=5), "f")
    with pytest.raises(ConfigError, match="stage2.epochs: 4, but stage2-.* is in epoch 5 already"):
        check_may_continue(settings_of(tmp_path, stage2__epochs=4), "f")
