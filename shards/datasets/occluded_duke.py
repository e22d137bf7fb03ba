"""Occluded-Duke: DukeMTMC-reID with every query, and some of the rest, partly hidden.

    Occluded_Duke/ (also below dukemtmcreid/, or the root itself)
        bounding_box_train/ query/ bounding_box_test/   names as in DukeMTMC-reID

All that is known of an image is in its name.
"""

from dataclasses import dataclass
from typing import ClassVar

from shards.datasets.dukemtmc import DukeMtmc


@dataclass(frozen=True)
class OccludedDuke(DukeMtmc):
    known_counts: ClassVar[dict[str, tuple[int, int]]] = {
        "train": (15618, 702),
        "query": (2210, 519),
        "gallery": (17661, 1110),
    }
    folder_name = "Occluded_Duke"
