"""Relative paths of a configuration made absolute, so that they mean the same on every worker."""

import sys
from pathlib import Path

from cluster.settings.config import Config
from shards.storage import is_local, local_path

PATHS = (("run", "dir"), ("run", "resume"), ("data", "shards"), ("stage1", "result"))


def at_project_root(config: Config) -> Config:
    """The same settings with local paths absolute; they start at the working folder.

    A submitted job works in Ray's copy of the project, which carries no data and is deleted with the job. There
    relative paths start at the checkout whose `.venv` runs the job, where there is one.
    """
    root = _checkout_of_job() or Path.cwd()
    sections = {}
    for section, key in PATHS:
        value = getattr(getattr(config, section), key)
        if value and is_local(value) and value not in ("auto", "never"):
            path = root / local_path(value).expanduser()
            sections.setdefault(section, getattr(config, section).model_dump())[key] = str(path)
    model = config.model
    if model.pretrained and (root / model.pretrained).exists():
        sections["model"] = model.model_dump() | {"pretrained": str(root / model.pretrained)}
    return Config.model_validate(config.model_dump() | sections)


def _checkout_of_job() -> Path | None:
    if "working_dir_files" not in Path.cwd().parts:
        return None
    checkout = Path(sys.prefix).parent
    return checkout if (checkout / "launch" / "train.py").exists() else None
