"""One rule for paths: ~ is the home folder, a relative path starts where the command is called."""

import argparse
import importlib
import json
from unittest.mock import patch

import pytest

from cluster.errors import ConfigError
from cluster.settings.config import Config, flatten
from cluster.settings.kinds import is_text, kind_of, path_mark
from cluster.settings.paths import PROJECT_ROOT, as_placed, expanded, with_absolute_paths
from cluster.settings.yaml_file import load_config, parse_config
from launch import bench
from launch.cli import Parser, local_place, place

KEYS = sorted(flatten(Config.model_validate({"data": {"shards": "a"}}).model_dump()))
PATHS = [key for key in KEYS if path_mark(kind_of(key))]
PATH_METAVARS = ("FILE", "DIR", "URL", "PATH", "RUN", "FOLDER")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The caller's folder, which is neither the project's nor the home."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return here


def placed(key, text):
    tree = {"data": {"shards": "a"}, "stages": [2], "stage1": {"result": "b"}}
    section, name = key.split(".")
    config = parse_config(tree | {section: tree.get(section, {}) | {name: text}})
    return flatten(with_absolute_paths(config).model_dump())[key]


def test_every_setting_that_takes_any_text_is_a_path():
    """No list names them: a new one that is no path needs a type of its own, and a line here."""
    choices = {key for key in KEYS if is_text(kind_of(key)) and not path_mark(kind_of(key)) and not _is_choice(key)}
    assert choices == set()
    assert len(PATHS) == 7


def _is_choice(key):
    with pytest.raises(ConfigError) as caught:
        parse_config(_tree(key, "no such word"))
    return f"{key}: 'no such word' should be" in str(caught.value)


def _tree(key, value):
    tree = {"data": {"shards": "a"}}
    section, _, name = key.rpartition(".")
    (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


@pytest.mark.parametrize("key", PATHS)
def test_the_rule_holds_for_every_path_setting(key, elsewhere, tmp_path):
    end = {"model.arch": ".json", "model.pretrained": ".pt"}.get(key, "")
    assert placed(key, f"~/a{end}") == f"{tmp_path}/home/a{end}"
    assert placed(key, f"a/b #1{end}") == f"{elsewhere}/a/b #1{end}"
    assert placed(key, f"./~a{end}") == f"{elsewhere}/~a{end}"
    assert placed(key, f"/a/b{end}") == f"/a/b{end}"
    assert placed(key, f"s3://bucket/~a{end}") == f"s3://bucket/~a{end}"
    with pytest.raises(ConfigError, match="write ./~nobody-by-that-name"):
        placed(key, f"~nobody-by-that-name/a{end}")


@pytest.mark.parametrize("key", PATHS)
def test_an_empty_path_is_refused(key):
    with pytest.raises(ConfigError, match=f"{key}: '' "):
        parse_config(_tree(key, ""))


def test_words_and_names_are_no_paths_but_files_that_are_there_are(elsewhere):
    assert placed("run.resume", "auto") == "auto" and placed("run.resume", "never") == "never"
    assert placed("model.pretrained", "openai") == "openai"
    assert placed("model.arch", "ViT-B-16-quickgelu") == "ViT-B-16-quickgelu"
    (elsewhere / "weights").write_text("")
    assert placed("model.pretrained", "weights") == f"{elsewhere}/weights"
    (elsewhere / "openai").mkdir()
    assert placed("model.pretrained", "openai") == "openai"


def test_a_shipped_model_keeps_its_name_unless_the_caller_has_another_file_of_that_name(elsewhere):
    shipped = "configs/models/tiny_vit.json"
    assert placed("model.arch", shipped) == shipped
    own = elsewhere / shipped
    own.parent.mkdir(parents=True)
    own.write_bytes((PROJECT_ROOT / shipped).read_bytes())
    assert placed("model.arch", shipped) == shipped
    own.write_text(json.dumps({"embed_dim": 1}))
    assert placed("model.arch", shipped) == str(own)


def test_a_path_that_an_older_run_kept_as_given_is_the_path_that_it_means(elsewhere):
    assert as_placed("model.arch", "mine.json") == f"{elsewhere}/mine.json"
    assert as_placed("stage2.lr", 0.1) == 0.1 and as_placed("model.sie", "none") == "none"


def test_a_base_starts_at_its_file_and_may_lie_in_the_home_folder(elsewhere, tmp_path):
    (tmp_path / "home" / "b.yaml").write_text("run: {seed: 5}\n")
    (tmp_path / "a.yaml").write_text("data: {shards: a}\n")
    (elsewhere / "c.yaml").write_text("base: [../a.yaml, ~/b.yaml]\n")
    assert load_config("c.yaml").run.seed == 5


class _Made(Exception):
    """Ends an entry point once its parser is made."""


def options(script):
    """All options of an entry point, those of its subcommands and benchmarks too."""
    mains = [importlib.import_module(f"launch.{script}").main]
    if script == "bench":
        mains = [importlib.import_module(f"launch.benchmarks.{name}").run for name in bench.names()]

    def stop(parser, *_):
        raise _Made(parser)

    stopping = {"parse_args": stop, "parse_intermixed_args": stop}
    for main in mains:
        with patch.multiple(Parser, **stopping), pytest.raises(_Made) as made:
            main([])
        yield from _actions(made.value.args[0])


def _actions(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from _actions(one)
        else:
            yield action


@pytest.mark.parametrize("script", ["train", "evaluate", "extract", "export", "figures", "pack", "status", "bench"])
def test_every_option_that_is_a_path_keeps_the_rule(script):
    named = [one for one in options(script) if str(one.metavar).split(".")[0].split("|")[0] in PATH_METAVARS]
    wrong = [one.dest for one in named if one.type not in (place, local_place)]
    assert named and wrong == []


def test_a_path_on_the_command_line_stays_as_it_is_but_for_the_home_folder(tmp_path):
    assert place("~/a b") == f"{tmp_path}/home/a b"
    for text in ("a/b", "./~a", "s3://b/~", "/a~"):
        assert place(text) == expanded(text) == text
    with pytest.raises(argparse.ArgumentTypeError, match="no home folder"):
        place("~nobody-by-that-name/a")
