"""Files of a run with another bit, torn, or with rubbish in them: passed over by name, refused in one line, done again,
or without effect; never read as something else."""

import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from clipreid.errors import ModelError
from clipreid.identity_table import IdentityTable
from clipreid.stage1 import TEXT_FEATURES
from clipreid.weights.card import find_card
from clipreid.weights.file import ModelCard, load_models, load_text, read_card, save_model
from clipreid.weights.initial import build_models
from clipreid.weights.pretrained import read_state_dict
from clipreid.weights.sealed import DamagedError
from clipreid.weights.tables import TOKENS
from cluster.checks.before_run import _stage1_result_faults
from cluster.checks.may_continue import check_may_continue
from cluster.errors import ConfigError
from cluster.launchers.run import is_finished
from cluster.ranks.team import Team
from cluster.run.manifest import FOLDER, Position, read_manifests
from cluster.run.reporter import run_identity
from cluster.run.run_folder import RunFolder, read_metrics, read_status
from cluster.run.storage import Storage
from cluster.settings.config import results_settings
from cluster.training.stage1_result import Stage1Result
from shards.sealed import SealError, seal, unseal
from tests.helpers.checkpoints import at, loaded, names, newest_at, save, settings_of, writer_at
from tests.helpers.damage import RUBBISH, TORN, flips
from tests.helpers.settings import model_spec


@pytest.fixture
def two_checkpoints(tmp_path):
    """A run with checkpoints of steps 3 and 7, and the newest one's manifest."""
    settings = json.loads(json.dumps(results_settings(settings_of(tmp_path))))
    save(writer_at(tmp_path, settings=settings), 3, 7)
    return tmp_path, max((tmp_path / FOLDER).glob("*/manifest.json"))


def test_every_other_bit_of_a_manifest_is_found(two_checkpoints, monkeypatch):
    folder, path = two_checkpoints
    content, run = path.read_bytes(), Storage(str(folder))
    (older, newest), _ = read_manifests(run)
    read, flipped = Storage.read, content
    monkeypatch.setattr(Storage, "read", lambda s, n: flipped if path.parent.name in s.url else read(s, n))
    without_effect = 0
    for changed in flips(content):
        flipped = changed
        manifests, faults = read_manifests(run)
        if faults:
            assert manifests == [older] and list(faults) == [newest.name]
            assert f"{path} cannot be read" in faults[newest.name].text and "\n" not in faults[newest.name].text
        else:
            assert manifests == [older, newest]
            without_effect += 1
    assert without_effect < len(content) // 20  # The case of an exponent's letter, for one.


def test_a_manifest_with_another_bit_is_passed_over_by_name_wherever_a_run_looks(two_checkpoints, caplog):
    folder, path = two_checkpoints
    for content in flips(path.read_bytes(), 200):
        path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_may_continue(settings_of(folder), "f")
            where = loaded(folder)
        assert where == ((3, 3.0) if caplog.text else (7, 7.0))
        assert not caplog.text or path.parent.name in caplog.text


def test_other_settings_are_refused_as_before_and_not_for_a_damaged_manifest(two_checkpoints):
    folder, _ = two_checkpoints
    with pytest.raises(ConfigError, match="stage2.lr"):
        check_may_continue(settings_of(folder, stage2__lr=1e-3), "f")


@pytest.mark.parametrize("content", RUBBISH)
def test_a_manifest_of_rubbish_is_passed_over_and_goes_with_the_next_checkpoint(two_checkpoints, content):
    folder, path = two_checkpoints
    path.write_bytes(content)
    check_may_continue(settings_of(folder), "f")
    assert newest_at(folder).position == at(3)
    save(writer_at(folder), 9)
    assert names(folder) == [3, 9] and not path.exists()


@pytest.mark.parametrize("key", ["position", "files", "settings", "world_size", "fingerprint", "name"])
def test_a_manifest_without_checksum_that_lacks_or_mistypes_a_key_is_passed_over(two_checkpoints, key):
    folder, path = two_checkpoints
    tree = unseal(path.read_bytes())
    for changed in (tree | {key: None}, {name: value for name, value in tree.items() if name != key}):
        path.write_text(json.dumps(changed))
        assert newest_at(folder).position == at(3)
    path.write_text(json.dumps(tree))
    assert newest_at(folder).position == at(7)


def test_the_seal_holds_whatever_the_layout_and_the_types_that_json_knows():
    facts = {"b": (1, 2), "a": {2: 0.1, 10: None}, "ü": "ß"}
    sealed = seal(facts)
    assert unseal(json.dumps(sealed, indent=3, sort_keys=True).encode()) == json.loads(json.dumps(facts))
    assert unseal(b'{"a": 1}') == {"a": 1}
    for content in RUBBISH:
        with pytest.raises(SealError):
            unseal(content)


# --- weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small model.safetensors, its content, and the models that it holds."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    spec = model_spec("configs/models/tiny_vit.json", image_size=(32, 16), identities=5)
    models = build_models(spec, seed=3)
    save_model(path, models, ModelCard(spec, (0.5,) * 3, (0.5,) * 3, ("img", "proj")))
    return path, path.read_bytes(), models


def header_and_data(content, count):
    """Flips of both, as most bits are the tensors'."""
    end = 8 + int.from_bytes(content[:8], "little")
    yield from (flipped + content[end:] for flipped in flips(content[:end], count))
    yield from flips(content, count)


def same(models, expected):
    found = models.state_dict()
    return all(torch.equal(value, found[name]) for name, value in expected.state_dict().items())


def test_a_model_file_with_another_bit_is_refused_in_one_line_by_every_reader(weights, tmp_path):
    _, content, models = weights
    path = tmp_path / "model.safetensors"
    without_effect = 0
    for flipped in header_and_data(content, 100):
        path.write_bytes(flipped)
        try:
            found = load_models(path)
        except ModelError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            with pytest.raises(ModelError):
                read_state_dict(path)
        else:
            assert same(found, models) and find_card(path)
            without_effect += 1
    assert without_effect < 20  # In the header's layout.


def test_a_model_file_of_ours_that_was_changed_is_not_taken_for_one_of_others(weights, tmp_path):
    _, content, *_ = weights
    path = tmp_path / "model.safetensors"
    for before, after in ((b'"clipreid"', b'"clipreie"'), (b"tensors_sha256", b"tensorr_sha256"), (b"0.5", b"0.7")):
        assert before in content
        path.write_bytes(content.replace(before, after))
        with pytest.raises(DamagedError, match="changed since it was written.*damaged; copy it again"):
            find_card(path)


@pytest.mark.parametrize("tear", TORN)
def test_a_torn_model_file_is_refused_in_one_line(weights, tmp_path, tear):
    _, content, *_ = weights
    path = tmp_path / "model.safetensors"
    path.write_bytes(TORN[tear](content))
    for read in (load_models, load_text, read_card, read_state_dict):
        with pytest.raises(ModelError) as caught:
            read(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_weights_without_checksums_are_read_as_they_are(weights, tmp_path):
    """Those of earlier versions and of others."""
    path, _, models = weights
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        card = {"clipreid": file.metadata()["clipreid"]}
    old = tmp_path / "old.safetensors"
    save_file(state, old, card)
    assert same(load_models(old), models) and find_card(old) == find_card(path)
    save_file(state, old)
    assert find_card(old) is None and read_state_dict(old).keys() == state.keys()


def test_a_stage_1_file_with_another_bit_or_torn_is_refused_in_one_line(tmp_path):
    tokens, texts = IdentityTable(TOKENS, 5, torch.randn(5, 4, 6)), IdentityTable(TEXT_FEATURES, 5, torch.randn(5, 8))
    result = Stage1Result(tokens, texts, list("abcde"), "f", "e")
    result.write(Storage(str(tmp_path)), Team())
    path = tmp_path / "stage1.safetensors"
    content = path.read_bytes()
    for changed in [*header_and_data(content, 200), *(tear(content) for tear in TORN.values()), *RUBBISH]:
        path.write_bytes(changed)
        try:
            found = Stage1Result.read(str(path))
        except ModelError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            assert [*_stage1_result_faults(str(path))] or "is no result of stage 1" in str(error)
        else:
            assert torch.equal(found.tokens.block, tokens.block)
            assert torch.equal(found.text_features.block, texts.block)
            assert (found.label_names, found.fingerprint, found.encoder) == (list("abcde"), "f", "e")


# --- the run folder


def test_a_status_with_another_bit_or_torn_counts_as_none(tmp_path):
    folder, storage = RunFolder(settings_of(tmp_path)), Storage(str(tmp_path))
    folder.status(now=True, phase="finished", run={"settings": "x"})
    status, content = read_status(storage), (tmp_path / "status.json").read_bytes()
    assert status["phase"] == "finished"
    for changed in [*flips(content), *RUBBISH]:
        (tmp_path / "status.json").write_bytes(changed)
        found = read_status(storage)  # A seal whose own name has another bit is one key more.
        assert found == {} or {name: found.get(name) for name in status} == status
    for changed in RUBBISH:
        (tmp_path / "status.json").write_bytes(changed)
        RunFolder(settings_of(tmp_path)).close()


def test_metrics_with_another_bit_or_torn_are_measured_again_and_named(tmp_path, caplog):
    folder, storage = RunFolder(settings_of(tmp_path)), Storage(str(tmp_path))
    metrics = {"mAP": 0.25, "untrained": {"mAP": 0.125, "R1": 1e-05}}
    folder.write_metrics(metrics)
    path = tmp_path / "metrics.json"
    content = path.read_bytes()
    assert json.loads(content) == read_metrics(storage) == metrics
    again = RunFolder(settings_of(tmp_path))  # Its first status does not lose the checksum.
    again.status(now=True, phase="start")
    for changed in [*flips(content), *RUBBISH]:
        path.write_bytes(changed)
        caplog.clear()
        found = read_metrics(storage)
        assert found == metrics or (found == {} and f"{path} cannot be used" in caplog.text)
    path.unlink()
    assert read_metrics(storage) == {}


def test_a_finished_run_whose_results_are_damaged_is_not_taken_for_finished(weights, tmp_path, caplog):
    _, content, *_ = weights
    config, model = settings_of(tmp_path), tmp_path / "model.safetensors"
    folder = RunFolder(config)
    folder.write_metrics({"mAP": 0.25})
    model.write_bytes(content)
    trained = settings_of(tmp_path, train__precision="bf16")  # As its device decided.
    folder.status(now=True, phase="finished", run=run_identity(trained))
    assert is_finished(config) and is_finished(trained)
    assert not is_finished(settings_of(tmp_path, train__precision="float32"))
    for changed in [next(flips(content, 1, seed)) for seed in range(20)] + [tear(content) for tear in TORN.values()]:
        model.write_bytes(changed)
        assert not is_finished(config)
    assert f"{model}" in caplog.text and "made again" in caplog.text
    model.write_bytes(content)
    (tmp_path / "metrics.json").write_bytes(b"")
    assert not is_finished(config)


@pytest.mark.parametrize("content", RUBBISH)
def test_a_log_of_rubbish_is_begun_anew_and_says_what_it_lacks(tmp_path, content, caplog):
    (tmp_path / "log.jsonl").write_bytes(content)
    folder = RunFolder(settings_of(tmp_path))
    folder.go_on_from(Position(2, 2, 1, 7, False))
    folder.log({"stage": 2, "epoch": 2, "step": 8})
    folder.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [8]
    assert "log.jsonl lacks stage 2, steps 1 to 7" in caplog.text


def test_a_log_with_torn_lines_keeps_the_others_and_says_which_steps_it_lacks(tmp_path, caplog):
    lines = [json.dumps({"stage": stage, "step": step}).encode() for stage in (1, 2) for step in range(1, 10)]
    lines[3] = bytes(len(lines[3]))
    lines[11:14] = [b'{"stage": 2, "st', b"\xff" * 9, b"[]"]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines[:-3]) + b"\n")
    folder = RunFolder(settings_of(tmp_path))
    folder.go_on_from(Position(2, 2, 1, 9, False))
    folder.status(now=True, phase="stage 2")
    folder.close()
    lacks = "stage 1, steps 4 to 4, stage 2, steps 3 to 5, stage 2, steps 7 to 9"
    assert f"log.jsonl lacks {lacks}" in caplog.text
    assert read_status(Storage(str(tmp_path)))["log_gap"] == lacks
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 11
