"""Open-set evaluation of a dataset, and what it says about decisions kept in the weights' card.

descriptors, labels ──▶ retrieval.open_set ──▶ [open set] ──▶ "open_set" of the metrics, the card of model.safetensors
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipreid.retrieval.open_set import open_set
from clipreid.retrieval.positives import Labels
from clipreid.retrieval.rules import Rule
from clipreid.retrieval.vehicleid import draw_gallery, largest_list
from clipreid.weights.card import MODEL_FILE
from clipreid.weights.file import with_decision
from cluster.evaluation.features import Progress, no_progress
from cluster.ranks.team import Team
from cluster.settings.config import WEIGHT_SUFFIXES, Config
from shards.loading.index import ShardIndex
from shards.owner import owned_file
from shards.storage import is_local, join, write_atomic


@dataclass(frozen=True)
class OpenSetSettings:
    """What is asked for."""

    rate: float
    """The FPIR that a threshold is wanted for."""
    seed: int
    """Draws the identities that are taken out of the gallery."""


def open_set_metrics(
    query: tuple[np.ndarray, Labels],
    gallery: tuple[np.ndarray, Labels],
    rule: Rule,
    settings: OpenSetSettings,
    team: Team,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The same on every rank. query, gallery: descriptors, float32 [n, D], and what is known of them."""
    on_device = torch.from_numpy(query[0]).to(team.device)
    found = open_set(
        *(on_device, query[1], *gallery),
        rule=rule,
        rate=settings.rate,
        seed=settings.seed,
        peers=team.patiently("merge evaluation"),
        progress=progress,
    )
    return found.metrics()


def open_set_of_test(
    features: np.ndarray, identities: np.ndarray, lists: np.ndarray, settings: OpenSetSettings, team: Team
) -> dict[str, Any]:
    """The same for VehicleID: in the first draw of the largest test list. float32 [n, D] of split test."""
    members = largest_list(identities, lists)
    chosen = draw_gallery(identities[members], settings.seed, 0)
    sets = [(features[rows], Labels(identities[rows])) for rows in (np.delete(members, chosen), members[chosen])]
    return open_set_metrics(sets[0], sets[1], "none", settings, team)


def keep_decision(weights: str, path: Path, metrics: dict[str, Any], config: Config, index: ShardIndex) -> str:
    """Put threshold and probability of an open-set evaluation into the card of the weights; where they are.

    weights: as they were named, a run folder or a file, path or URL. path: the file behind it. The tensors stay as they
    are. Whoever reads the card finds beside the figures by what they were measured. Raises OwnedError.
    """
    found = metrics["open_set"]
    decision = {name: found[name] for name in ("threshold", "same_identity") if name in found}
    decision["measured"] = {
        "dataset": {"name": index.name, "fingerprint": index.fingerprint},
        "descriptor": list(config.eval.descriptor),
        "flip": config.eval.flip,
        "rule": "none" if "test" in index.splits else config.eval.rule,
        "gallery": {"identities": found["identities"], "images": found["images"]},
    }
    place = str(path)
    if not is_local(weights):
        place = weights if weights.endswith(WEIGHT_SUFFIXES) else join(weights, MODEL_FILE)
    with owned_file(place, "keeping a decision"), write_atomic(place) as file:
        for piece in with_decision(path, decision):
            file.write(piece)
    return place
