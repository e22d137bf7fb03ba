"""The one rule for paths, whoever gives them: a setting, an option of a command, a base of a settings file.

    Config of the command line ──▶ [paths] ──▶ Config of the workers

`~` is the home folder, and a relative path starts at the folder that the command is called in. Settings become
absolute, so that they mean the same on every worker. URLs and names that are no paths stay as they are.

A job submitted to Ray is called in Ray's copy of the project, which carries no data and is deleted with the job. What
came with the copy, settings files and configs/, is found there; all other relative paths start at the checkout whose
`.venv` runs the job, where there is one.
"""

import sys
from pathlib import Path
from typing import Any

from clipreid.weights.card import MODEL_FILE
from cluster.errors import ConfigError
from cluster.settings.config import Config, PathMark
from cluster.settings.kinds import field_kind, kind_of, path_mark
from shards.storage import local_path, path_fault

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def expanded(path: str) -> str:
    """A path with its `~` or `~user` replaced; a URL as it is. Raises ConfigError where no such home is known, and for
    what no file can be called."""
    _require_possible(path)
    if not path.removeprefix("file://").startswith("~"):
        return path
    try:
        return str(Path(path.removeprefix("file://")).expanduser())
    except RuntimeError:
        raise ConfigError(
            f"{path}: no home folder of that name is known; write ./{path} for a name that begins with ~"
        ) from None


def absolute(path: str, start: Path) -> str:
    """By the rule; a URL as it is. Raises ConfigError as `expanded`."""
    local = local_path(expanded(path))
    return path if local is None else str(start / local)


def with_absolute_paths(config: Config) -> Config:
    """The same settings with local paths absolute. Raises ConfigError as `expanded`."""
    return Config.model_validate(_placed(config.model_dump(), Config, _start()))


def placed_setting(text: str, mark: PathMark, start: Path) -> str:
    """The text of a setting that may be a path, by the rule.

    A file shipped in configs/ keeps its name, which every node finds below its own root, unless the caller has another
    file by that name.
    """
    _require_possible(text)
    if text in mark.words or (mark.suffixes and not _is_path(text, mark.suffixes, start)):
        return text
    path = absolute(text, start)
    shipped = PROJECT_ROOT / text
    if mark.shipped and shipped.is_file() and not (Path(path).is_file() and _differ(Path(path), shipped)):
        return text
    return path


def as_placed(key: str, value: Any) -> Any:
    """The value of any setting, by its dotted key, as this start would have it: older runs kept some paths as given."""
    mark = path_mark(kind_of(key))
    return placed_setting(value, mark, _start()) if mark and isinstance(value, str) else value


def shipped_file(name: str) -> str:
    """Where a file of this project lies on this node that a setting names: of `model.arch`, of `model.pretrained`.
    Other paths, and names that open_clip knows, stay as they are."""
    shipped = PROJECT_ROOT / name
    return str(shipped) if "/" in name and shipped.is_file() else name


def _placed(tree: dict[str, Any], section: Any, start: Path) -> dict[str, Any]:
    placed = dict(tree)
    for key, value in tree.items():
        kind = field_kind(section, key)
        if isinstance(value, dict):
            placed[key] = _placed(value, kind, start)
        elif isinstance(value, str) and (mark := path_mark(kind)):
            placed[key] = placed_setting(value, mark, start)
    return placed


def _require_possible(path: str) -> None:
    if fault := path_fault(path):
        raise ConfigError(f"{ascii(path[:80])[1:-1]}{'…' * (len(path) > 80)}: {fault}: give another path")


def _is_path(text: str, suffixes: tuple[str, ...], start: Path) -> bool:
    here = (start / text).is_file() or (start / text / MODEL_FILE).is_file()  # a run folder
    return text.endswith(suffixes) or "/" in text or text.startswith("~") or here


def _differ(one: Path, other: Path) -> bool:
    return one.read_bytes() != other.read_bytes()


def _start() -> Path:
    here, checkout = Path.cwd(), Path(sys.prefix).parent
    in_job = "working_dir_files" in here.parts
    return checkout if in_job and (checkout / "launch" / "train.py").exists() else here
