"""Where an evaluation's figures go: beside what was evaluated, and never over those of another evaluation.

    metrics ──▶ [result file] ──▶ RUN/evaluation.json, NAME.metrics.json beside NAME.npz or NAME.pth

An evaluation done again gives the same figures bit by bit, so it finds its own file. RUN/metrics.json is the run's own.
"""

from pathlib import Path, PurePosixPath
from typing import Any

from clipreid.weights.card import MODEL_FILE
from cluster.run.run_folder import CONFIG, LOG, METRICS, STAGE1_RESULT, STATUS
from cluster.run.storage import Storage
from cluster.settings.config import WEIGHT_SUFFIXES
from shards.storage import join, local_path

OF_A_RUN = (CONFIG, LOG, METRICS, STATUS, STAGE1_RESULT, MODEL_FILE)
"""Files of a run folder that no evaluation may write."""
RESULT = "evaluation.json"


def default_place(evaluated: str) -> str:
    """For a run folder, a file of weights, or features: a path or URL."""
    local = local_path(evaluated)
    name = PurePosixPath(local or evaluated)
    is_run = local.is_dir() if local else not evaluated.endswith(WEIGHT_SUFFIXES)
    if is_run and name.suffix != ".parquet":
        return join(evaluated, RESULT)
    return evaluated.rstrip("/").removesuffix(name.name) + f"{name.stem}.metrics.json"


def is_of_a_run(path: Path) -> bool:
    """Whether a file has the name of one that belongs to the run in whose folder it is."""
    return path.name in OF_A_RUN and (path.absolute().parent / LOG).exists()


def write_result(metrics: dict[str, Any], place: str, *, replace: bool) -> str:
    """Where they went: to the place or, unless `replace`, to the next number that no other figures have."""
    name, number = PurePosixPath(place), 1
    folder, chosen = Storage(place.removesuffix(name.name) or "."), name.name
    while not replace and _holds_others(folder, chosen, metrics):
        number += 1
        chosen = f"{name.stem}-{number}{name.suffix}"
    folder.write_json(chosen, metrics)
    return place.removesuffix(name.name) + chosen


def _holds_others(folder: Storage, name: str, metrics: dict[str, Any]) -> bool:
    try:
        return folder.read_json(name) != metrics
    except (FileNotFoundError, ValueError):  # A torn file has no figures to lose.
        return False
