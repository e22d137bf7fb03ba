"""Settings out of YAML files that share bases and `key.path=value` overrides; and back into YAML.

    configs/*.yaml, key.path=value ──▶ [yaml_file] ──▶ Config

Every fault is reported, one line each. Imports neither torch nor Ray, so that a mistake shows at once.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml import YAMLError

from cluster.errors import ConfigError
from cluster.settings.config import Config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with its bases, apply `key.path=value` overrides, and validate.

    Raises ConfigError with every fault, one line each, before anything heavy is imported.
    """
    tree = _read_yaml(Path(path), seen=())
    for override in overrides:
        if "=" not in override or override.startswith(("=", "-")):
            raise ConfigError(f"{override!r} is not an override: write key.path=value, for example stage2.epochs=10")
        try:
            tree = _merged(tree, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise ConfigError(f"{override!r} cannot be applied: {_first_line(error)}") from None
    settings = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(settings, dict)
    return parse_config(settings)


def parse_config(tree: Mapping[Any, Any]) -> Config:
    """Validate a plain nested dictionary. Raises ConfigError with one line per fault."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [line for fault in error.errors() for line in _fault_lines(fault)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; loading it gives the same settings."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    path = path.expanduser()
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file" + (f" (base of {seen[-1]})" if seen else ""))
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base refers back to itself")
    try:
        tree = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_first_line(error)}") from None
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: holds a list, but settings are keys with values")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    parents = [_read_yaml(path.parent / base, (*seen, path.resolve())) for base in bases]
    return _merged(*parents, tree)


def _merged(*trees: DictConfig) -> DictConfig:
    """Later ones win."""
    tree = OmegaConf.merge(*trees)
    assert isinstance(tree, DictConfig)
    return tree


def _fault_lines(fault: ErrorDetails) -> list[str]:
    """One pydantic error as lines that name the key, the value and what is accepted."""
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        return [_unknown_key(path)]
    if fault["type"] == "missing":
        return [f"{'.'.join(path)}: not given, and it has no default"]
    if not path:
        return str(fault["ctx"]["error"]).split("\n")
    message = fault["msg"][0].lower() + fault["msg"][1:].replace("Input should be", "should be")
    message = message.replace("input should be", "should be")
    key = ".".join(part for part in path if part not in ("constrained-int", "Elastic", "int", "str", "float"))
    return [f"{key}: {fault['input']!r} {message}"]


def _unknown_key(path: list[str]) -> str:
    section: type[BaseModel] = Config
    for part in path[:-1]:
        field = section.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        section = field.annotation
    known = sorted(section.model_fields)
    close = get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {'.'.join([*path[:-1], close[0]])}? " if close else ""
    return f"{'.'.join(path)}: unknown key; {hint}known here: {', '.join(known)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
