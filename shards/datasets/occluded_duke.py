"""Occluded-Duke: DukeMTMC-reID with every query, and some of the rest, partly hidden.

Occluded_Duke/ (also below dukemtmcreid/, or the root itself)
    bounding_box_train/ query/ bounding_box_test/   names as in DukeMTMC-reID
"""

from dataclasses import dataclass

from shards.datasets.dukemtmc import DukeMtmc


@dataclass(frozen=True)
class OccludedDuke(DukeMtmc):
    known_counts = {"train": (15618, 702), "query": (2210, 519), "gallery": (17661, 1110)}  # noqa: RUF012
    folder_name = "Occluded_Duke"
