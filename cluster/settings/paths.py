"""Relative paths of a configuration made absolute, so that they mean the same on every worker.

    Config of the command line ──▶ [paths] ──▶ Config of the workers

URLs and names that are no paths stay as they are.
"""

import sys
from pathlib import Path
from typing import Any

from cluster.settings.config import Config
from shards.storage import local_path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PATH_SETTINGS = (("run", "dir"), ("run", "resume"), ("data", "shards"), ("stage1", "result"))


def with_absolute_paths(config: Config) -> Config:
    """The same settings with local paths absolute; they start at the working folder.

    A submitted job works in Ray's copy of the project, which carries no data and is deleted with the job. There
    relative paths start at the checkout whose `.venv` runs the job, where there is one.
    """
    start = _checkout_of_job() or Path.cwd()
    sections: dict[str, dict[str, Any]] = {}
    for section, key in PATH_SETTINGS:
        value = getattr(getattr(config, section), key)
        if not value or value in ("auto", "never"):
            continue
        path = local_path(value)
        if path is not None:
            changed = sections.setdefault(section, getattr(config, section).model_dump())
            changed[key] = str(start / path.expanduser())
    model = config.model
    if model.pretrained and (start / model.pretrained).exists():
        sections["model"] = model.model_dump() | {"pretrained": str(start / model.pretrained)}
    return Config.model_validate(config.model_dump() | sections)


def arch_file(arch: str) -> str:
    """A JSON file's path starts at the working folder or, for the files shipped in configs/, at the project's root.
    Names of open_clip's models stay as they are."""
    shipped = PROJECT_ROOT / arch
    return str(shipped) if arch.endswith(".json") and not Path(arch).exists() and shipped.exists() else arch


def _checkout_of_job() -> Path | None:
    if "working_dir_files" not in Path.cwd().parts:
        return None
    checkout = Path(sys.prefix).parent
    return checkout if (checkout / "launch" / "train.py").exists() else None
