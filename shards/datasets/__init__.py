"""The parsers: one file a dataset, one line in the dictionary.

    native folders ──▶ [datasets] ──▶ ImageRecord ──▶ build

A parser knows one layout on disk and nothing of tar files, labels, ranks or training.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

from shards.datasets.cuhk03 import Cuhk03
from shards.datasets.dukemtmc import DukeMtmc
from shards.datasets.folders import Folders
from shards.datasets.manifest import Manifest
from shards.datasets.market1501 import Market1501
from shards.datasets.mot import Mot
from shards.datasets.msmt17 import Msmt17
from shards.datasets.occluded_duke import OccludedDuke
from shards.datasets.omniglot import Omniglot
from shards.datasets.vehicleid import VehicleId
from shards.datasets.veri776 import Veri776
from shards.errors import DataError
from shards.records import ImageRecord
from shards.storage import Source


class ReIDDataset(Protocol):
    """Reads one dataset's native folders. Options are dataclass fields, each with a default."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def noun(self) -> str:
        """What an image shows, as the prompts say it: "person", "vehicle", ..."""

    @property
    def num_cameras(self) -> int | None:
        """Cameras of the dataset, 0 when it has none, None to count those of the records."""

    @property
    def num_views(self) -> int | None:
        """The same for viewpoints."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits it has; an empty one is warned of."""

    @property
    def known_counts(self) -> dict[str, tuple[int, int]]:
        """Published (images, identities) of its splits and of any "test list N", for a note when the files differ."""

    def records(self, source: Source, warn: Callable[[str], None]) -> Iterator[ImageRecord]:
        """Every image of every split, in an order that only the names decide.

        Raises DataError where folders, lists or names are not as they should be; `warn` takes one line about
        what can be packed but is not as published.
        """


DATASETS: dict[str, type[ReIDDataset]] = {
    "cuhk03": Cuhk03,
    "dukemtmc": DukeMtmc,
    "folders": Folders,
    "manifest": Manifest,
    "market1501": Market1501,
    "mot": Mot,
    "msmt17": Msmt17,
    "occluded_duke": OccludedDuke,
    "omniglot": Omniglot,
    "vehicleid": VehicleId,
    "veri776": Veri776,
}


def get_dataset(name: str) -> type[ReIDDataset]:
    """The parser of that name; raises DataError naming the known ones."""
    if name not in DATASETS:
        raise DataError(f"dataset {name!r} is not known; known: {', '.join(sorted(DATASETS))}")
    return DATASETS[name]
