"""Settings: closed, inherited, overridden, and refused with one line per fault."""

from typing import get_args

import pytest

from cluster.errors import ConfigError
from cluster.settings.config import Config, Section, results_settings, settings_hash
from cluster.settings.paths import with_absolute_paths
from cluster.settings.yaml_file import dump_config, load_config, parse_config

LEAST = {"data": {"shards": "somewhere"}}


def sections(section=Config):
    """A section and all below it, each once."""
    yield section
    for field in section.model_fields.values():
        kinds = [field.annotation, *get_args(field.annotation)]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from sections(kind)


def test_every_setting_has_an_explanation():
    fields = {f"{kind.__name__}.{name}": f for kind in sections() for name, f in kind.model_fields.items()}
    assert len(fields) > 75 and "Elastic.min" in fields
    assert [name for name, field in fields.items() if not (field.description or "").strip()] == []


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def faults(tree):
    with pytest.raises(ConfigError) as caught:
        parse_config(LEAST | tree)
    return str(caught.value).split("\n")


def test_a_file_inherits_from_its_base_and_overrides_win(tmp_path):
    write(tmp_path, "base.yaml", "data: {shards: a}\nstage2: {epochs: 7, lr: 0.1}\nstage1: {epochs: 2}\n")
    child = write(tmp_path, "child.yaml", "base: base.yaml\nstage2: {lr: 0.2}\n")
    config = load_config(child, ["stage1.epochs=3", "eval.descriptor=[img]", "cluster.workers={min: 2, max: 8}"])
    assert (config.stage2.epochs, config.stage2.lr, config.stage1.epochs) == (7, 0.2, 3)
    assert config.eval.descriptor == ("img",)
    assert config.allowed_workers() == [2, 4, 8]


def test_a_mistyped_key_is_named_with_the_closest_known_one():
    assert faults({"stage2": {"idenities": 4}})[0].startswith(
        "stage2.idenities: unknown key; did you mean stage2.identities?"
    )


def test_every_fault_is_reported_at_once():
    lines = faults({"stage2": {"lr": -1, "images_per_identity": 1}, "modl": {}})
    assert [line.split(":")[0] for line in lines] == ["stage2.lr", "stage2.images_per_identity", "modl"]


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"cluster": {"workers": 3}}, "cluster.workers"),
        ({"cluster": {"workers": {"min": 9, "max": 15}}}, "cluster.workers"),
        ({"stages": [2]}, "stage1.result"),
        ({"stages": [2, 1]}, "stages"),
        ({"method": "baseline", "stages": [2]}, "stage2.text_loss"),
        ({"method": "one_stage"}, "stages"),
        ({"method": "one_stage", "stages": [2], "stage2": {"text_loss": "none"}}, "stage2.text_loss"),
        ({"method": "one_stage", "stages": [2], "stage1": {"features": "average"}}, "stage1.features"),
        ({"method": "one_stage", "stages": [2], "stage1": {"result": "a"}}, "stage1.result"),
        ({"data": {"shards": "x", "locality": "node", "virtual_nodes": 5}}, "data.virtual_nodes"),
        ({"train": {"zero_stage": 3}}, "train.zero_stage"),
        ({"eval": {"descriptor": []}}, "eval.descriptor"),
        ({"eval": {"descriptor": ["img", "proj", "img"]}}, "eval.descriptor"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_by_key(tree, key):
    assert faults(tree)[0].startswith(key + ":")


@pytest.mark.parametrize("override", ["stage2.epochs", "--stage2.epochs=3", "=3", "stage2.epochs=[1"])
def test_an_override_that_cannot_be_read_is_refused(tmp_path, override):
    path = write(tmp_path, "c.yaml", "data: {shards: a}\n")
    with pytest.raises(ConfigError, match="stage2.epochs|=3"):
        load_config(path, [override])


def test_a_missing_file_and_a_circular_base_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    loop = write(tmp_path, "loop.yaml", "base: loop.yaml\n")
    with pytest.raises(ConfigError, match="refers back to itself"):
        load_config(loop)


def test_the_resolved_configuration_loads_to_the_same_settings(tmp_path):
    config = parse_config(LEAST | {"stage2": {"milestones": [3]}, "eval": {"rerank": [20, 6, 0.3]}})
    assert load_config(write(tmp_path, "config.yaml", dump_config(config))) == config


def test_only_settings_that_change_results_count_for_the_hash():
    def hashed(tree):
        return settings_hash(results_settings(parse_config(LEAST | tree)))

    plain = hashed({})
    assert plain == hashed({"cluster": {"workers": 2}, "checkpoint": {"keep": 5}, "stage2": {"epochs": 90}})
    assert plain != hashed({"run": {"seed": 1}})
    assert plain != hashed({"stage2": {"identities": 8}})


def test_relative_paths_start_at_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = parse_config({"data": {"shards": "s3://bucket/x"}, "run": {"dir": "runs/a"}})
    placed = with_absolute_paths(settings)
    assert placed.run.dir == str(tmp_path / "runs/a")
    assert placed.data.shards == "s3://bucket/x" and placed.run.resume == "auto"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.pixel_std=[0,0,0]", "data.pixel_std.0: 0 should be greater than or equal to 0.000001"),
        ("cluster.timeout_s=.inf", "cluster.timeout_s: inf should be a finite number"),
        ("stage2.lr=.nan", "stage2.lr: nan should be"),
        ("cluster.timeout_s=1e300", "cluster.timeout_s: 1e+300 should be less than"),
        ("cluster.workers=yes", "cluster.workers: True holds a switch"),
        ("train.zero_stage=true", "train.zero_stage: True holds a switch"),
        ("model.image_size=[yes,no]", "model.image_size: [True, False] holds a switch"),
        ("stage2.identities=1000000000000", "stage2.identities: 1000000000000 should be less than"),
        ("cluster.workers={min: 1, max: 1000000000000}", "cluster.workers.max: 1000000000000 should be"),
        ("model.image_size=[100000,100000]", "model.image_size.0: 100000 should be less than"),
        ("data.loaders=1000000", "data.loaders: 1000000 should be less than"),
        ("run.seed=99999999999999999999", "run.seed: 99999999999999999999 should be less than"),
        ("stage2.lr=" + "9" * 5000, "stage2.lr"),
    ],
)
def test_a_number_that_is_none_or_out_of_all_bounds_is_refused_in_one_short_line(override, words, tmp_path):
    path = write(tmp_path, "c.yaml", "data: {shards: a}\nstages: [1]\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    lines = str(caught.value).splitlines()
    assert any(words in line for line in lines) and all(len(line) < 300 or "9999" in line for line in lines), lines


def test_a_switch_stays_one_where_a_switch_is_meant(tmp_path):
    config = load_config(write(tmp_path, "c.yaml", "data: {shards: a}\n"), ["eval.flip=yes", "train.compile=off"])
    assert (config.eval.flip, config.train.compile) == (True, False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: 1\n# 配置\n".encode("gbk"), "line 2: is not UTF-8 text"),
        ("a: 1\n".encode("utf-16"), "line 1: is UTF-16 text; save it as UTF-8"),
        (b"base: null\n", "base: None is neither"),
        (b"- " * 5000, "readable"),
        (b"[" * 100_000, "readable"),
        (b"x" * 2_000_000, "2,000,000 characters, more than the 1,000,000"),
        (b"a: \0\n", "special characters are not allowed"),
    ],
)
def test_a_file_that_cannot_be_settings_is_refused_in_one_line_with_its_name(content, words, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and words in str(caught.value), caught.value
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
