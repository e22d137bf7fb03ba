"""Text is what is written, on the command line and in a file; lists take the form that a person gives them."""

import pytest

from cluster.errors import ConfigError
from cluster.settings.config import Config, flatten
from cluster.settings.kinds import is_text, kind_of
from cluster.settings.yaml_file import dump_config, load_config

TEXTS = (
    *("runs/exp #2", "2024_11_28", "20241128", "2024-11-28", "007", "1e3", "0x10", "1:30", "4.0", ".5", "1_000"),
    *("yes", "off", "true", "NaN", "a: b", "- a", "[x]", "{x}", "!x", "*x", "&x", "%x", "@x", '"q', "'runs/a'", "???"),
    *("${oc.env:HOME}/runs", r"a\${x}", "${", "runs/50%", " a ", "a\\nb", "实验 1", "a=b", "#", "~", "=", "<<"),
)


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "c.yaml").write_text(text)
        return tmp_path / "c.yaml"

    return write


@pytest.mark.parametrize("key", ["run.dir", "data.shards", "data.cache_dir", "model.pretrained", "stage1.result"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_on_the_command_line_stands_as_it_is_and_in_the_runs_own_settings(file, key, text):
    stages = ["stages=[2]"] if key == "stage1.result" else []
    config = load_config(file("data: {shards: a}\n"), [f"{key}={text}", *stages])
    assert flatten(config.model_dump())[key] == text
    assert load_config(file(dump_config(config))) == config


@pytest.mark.parametrize(
    "text", ["2024_11_28", "007", "1e3", "0x10", "1:30", "4.0", "yes", "2024-11-28", "???", "${x}"]
)
def test_text_in_a_file_needs_no_quotes_because_it_looks_like_something_else(file, text):
    config = load_config(file(f"run: {{dir: a}}\ndata:\n  shards: {text}\n  cache_dir: {text}\nbase: []\n"))
    assert config.data.shards == config.data.cache_dir == text


def test_no_text_is_null_where_a_setting_may_have_none_and_a_word_where_it_must_have_one(file):
    path = file("data: {shards: a, cache_dir: null}\nmodel: {pretrained: 'null'}\n")
    assert load_config(path, ["run.dir=null"]).run.dir == "null"
    config = load_config(path)
    assert (config.data.cache_dir, config.model.pretrained) == (None, "null")
    assert load_config(path, ["model.pretrained=null"]).model.pretrained is None


def test_words_to_choose_from_are_text_too(file):
    path = file("data: {shards: a}\n")
    for override in ("eval.rule=no", "method=two_stage #2"):
        with pytest.raises(ConfigError, match=f"{override.split('=')[0]}: '{override.split('=')[1]}' should be"):
            load_config(path, [override])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("eval.rerank=20,6,0.3", (20, 6, 0.3)),
        ("eval.rerank=(20, 6, 0.3)", (20, 6, 0.3)),
        ("eval.rerank=[20,6,0.3]", (20, 6, 0.3)),
        ("eval.rerank=null", None),
        ("model.image_size=256x128", (256, 128)),
        ("model.image_size=256,128", (256, 128)),
        ("stage2.milestones=30,50", (30, 50)),
        ("stage2.milestones=30", (30,)),
        ("stage2.milestones=[]", ()),
        ("eval.descriptor=img,proj", ("img", "proj")),
        ("stages=1,2", (1, 2)),
    ],
)
def test_a_list_is_taken_in_the_form_that_a_person_writes(file, override, value):
    key, _, words = override.partition("=")
    assert flatten(load_config(file("data: {shards: a}\n"), [override]).model_dump())[key] == value
    section, _, name = key.rpartition(".")
    in_file = f"{section}: {{{name}: '{words}'}}" if section else f"{name}: '{words}'"
    if not words.startswith("[") and value is not None:
        assert flatten(load_config(file(f"data: {{shards: a}}\n{in_file}\n")).model_dump())[key] == value


@pytest.mark.parametrize("override", ["eval.rerank=20,6", "eval.rerank=", "model.image_size=256", "stage2.milestones="])
def test_a_list_that_is_none_is_refused_in_one_line(file, override):
    path = file("data: {shards: a}\n")
    if override == "eval.rerank=":
        assert load_config(path, [override]).eval.rerank is None
        return
    with pytest.raises(ConfigError, match=r"too few values|a list, written as 30,50") as caught:
        load_config(path, [override])
    assert len(str(caught.value).splitlines()) == 1


def test_numbers_switches_and_sections_are_yaml_as_ever(file):
    path = file("data: {shards: a}\nstage2: {lr: 5e-6, epochs: 1e1}\neval: {flip: yes}\n")
    config = load_config(path, ["stage1.lr=1e-3", "cluster.workers={min: 2, max: 4}", "train.compile=true"])
    assert (config.stage2.lr, config.stage2.epochs, config.eval.flip) == (5e-6, 10, True)
    assert (config.stage1.lr, config.cluster.worker_range, config.train.compile) == (1e-3, (2, 4), True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {shards: a}\nrun: {seed: 1}\nrun: {seed: 2}\n", "run: there twice"),
        ("data:\n  shards: a\n  shards: b\n", "shards: there twice"),
        ("data:\n\tshards: a\n", r"line 2, column 1"),
        ("a: &a [*a]\n", "more than 10,000 values"),
        ("a: &a {b: *a}\n", "more than 10,000 values"),
        ("a: &a [1,2,3,4]\nb: &b [" + "*a," * 50 + "]\nc: [" + "*b," * 99 + "]\n", "10,000"),
        ("- " * 3000 + "\n", "readable"),
        ("data: {shards: !!python/object:os.system x}\nrun: {seed: !!python/name:os.system x}\n", "readable|seed"),
        ("base: [[a]]\n", "base: "),
        ("base: 3\n", "base: 3 is neither"),
        ("- a\n", "no keys with values"),
        ("a\n", "no keys with values"),
    ],
)
def test_a_file_that_is_no_settings_is_refused_in_one_line_with_the_place(file, text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(file(text))
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_of_another_encoding_is_refused_and_a_byte_order_mark_is_none(file, tmp_path):
    path = file("")
    path.write_bytes("data: {shards: 实验}\n".encode("gbk"))
    with pytest.raises(ConfigError, match="UTF-8 text"):
        load_config(path)
    path.write_bytes("\ufeffdata: {shards: 实验}\n".encode())
    assert load_config(path).data.shards == "实验"


def test_which_settings_are_text_is_said_by_their_types():
    keys = flatten(Config.model_validate({"data": {"shards": "a"}}).model_dump())
    texts = {key for key in keys if is_text(kind_of(key))}
    assert {"run.dir", "run.resume", "data.cache_dir", "model.arch", "model.pretrained", "stage1.result"} < texts
    assert texts.isdisjoint({"run.seed", "eval.rerank", "eval.descriptor", "stage2.triplet_levels", "cluster.workers"})
    assert kind_of("run.nothing") is None and kind_of("nothing.dir") is None
