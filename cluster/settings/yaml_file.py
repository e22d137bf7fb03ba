"""Settings out of YAML files that share bases and `key.path=value` overrides; and back into YAML.

    configs/*.yaml, key.path=value ──▶ [yaml_file] ──▶ Config

Text is taken as it stands, see `as_written.py`. Every fault is reported, one line each. Imports neither torch nor
Ray, so that a mistake shows at once.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.errors import ConfigError
from cluster.settings.as_written import Dumper, parse, parse_words
from cluster.settings.config import Config
from cluster.settings.kinds import field_kind, is_optional, kind_of, section_of
from cluster.settings.paths import expanded
from shards.errors import DataError
from shards.storage import read_text

MOST_TEXT = 1_000_000
"""Characters of a settings file."""
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with its bases, apply `key.path=value` overrides, and validate.

    Raises ConfigError with every fault, one line each, before anything heavy is imported.
    """
    return parse_config(load_tree(path, overrides))


def load_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The same as a tree, not validated yet: what is given, without defaults."""
    return with_overrides(_read_yaml(Path(path), seen=()), overrides)


def with_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A tree of settings with `key.path=value` put into it. Raises ConfigError for what is none."""
    for override in overrides:
        key, equals, words = override.partition("=")
        if not key or not equals or key.startswith("-"):
            raise ConfigError(f"{override!r} is not an override: write key.path=value, for example stage2.epochs=10")
        try:
            value = parse_words(words, kind_of(key))
        except UNREADABLE as error:
            raise ConfigError(f"{override!r} cannot be applied: {_in_one_line(error)}") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merged(tree, value)
    return tree


def parse_tree(text: str, source: str | Path) -> dict[str, Any]:
    """The tree of settings in a YAML text. Raises ConfigError, which names the source, for what is none."""
    if len(text) > MOST_TEXT:
        raise ConfigError(f"{source}: {len(text):,} characters, more than the {MOST_TEXT:,} that settings can have")
    try:
        tree = parse(text) or {}
    except UNREADABLE as error:
        raise ConfigError(f"{source}: not readable as YAML: {_in_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: holds no keys with values, as settings are")
    return tree


def parse_config(tree: Mapping[Any, Any]) -> Config:
    """Validate a plain nested dictionary. Raises ConfigError with one line per fault."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [line for fault in error.errors() for line in _fault_lines(fault)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; loading it gives the same settings."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        fault = "is no file" if path.exists() else "no such file"
        raise ConfigError(f"--config {path}: {fault}" + (f" (base of {seen[-1]})" if seen else ""))
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base refers back to itself")
    try:
        tree = parse_tree(read_text(str(path)), path)
    except DataError as error:
        raise ConfigError(str(error)) from None
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base: {bases!r} is neither a file's name nor a list of them")
    both: dict[str, Any] = {}
    for parent in bases:
        both = merged(both, _read_yaml(path.parent / expanded(parent), (*seen, path.resolve())))
    return merged(both, tree)


def merged(tree: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Key by key; the later one wins."""
    both = dict(tree)
    for key, value in later.items():
        before = both.get(key)
        both[key] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return both


def _fault_lines(fault: ErrorDetails) -> list[str]:
    """One pydantic error as lines that name the key, the value and what is accepted."""
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        return [_unknown_key(path)]
    if fault["type"] == "missing":
        if isinstance(fault["loc"][-1], int):
            return [f"{'.'.join(path[:-1])}: too few values"]
        return [f"{'.'.join(path)}: not given, and it has no default"]
    if not path:
        return str(fault["ctx"]["error"]).split("\n")
    message = fault["msg"][0].lower() + fault["msg"][1:].replace("Input should be", "should be")
    message = message.replace("input should be", "should be").removeprefix("value error, ")
    key = ".".join(part for part in path if part not in ("constrained-int", "Elastic", "int", "str", "float"))
    if fault["type"] == "tuple_type":
        message = "should be a list, written as 30,50 or [30, 50]" + (", or null" if is_optional(kind_of(key)) else "")
    return [f"{key}: {_shortened(repr(fault['input']))} {message}"]


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _unknown_key(path: list[str]) -> str:
    section: type[BaseModel] = Config
    for part in path[:-1]:
        section = section_of(field_kind(section, part)) or section
    known = sorted(section.model_fields)
    close = get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {'.'.join([*path[:-1], close[0]])}? " if close else ""
    return f"{_shortened('.'.join(path))}: unknown key; {hint}known here: {', '.join(known)}"


def _in_one_line(error: Exception) -> str:
    """What is wrong, and in which line; YAML's own story of it takes several."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None and problem:
        return f"{problem} (line {mark.line + 1}, column {mark.column + 1})"
    return str(error).strip().split("\n")[0]
