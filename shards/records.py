"""What a dataset parser says about one image: everything but its pixels.

    datasets ──▶ [records] ──▶ build ──▶ shards + index.parquet

A parser makes them; whoever packs or checks a dataset reads them.
"""

from dataclasses import dataclass

SPLITS = ("train", "query", "gallery", "test")
"""All splits, in the order of the index. `test` is VehicleID's: it has no fixed query and gallery."""

UNKNOWN_IDENTITIES = ("", "-1")
"""What stands for no identity: images that have one of these are not of one identity."""


@dataclass(frozen=True, slots=True)
class Crop:
    """An image that is part of a file."""

    file: str
    """Posix path below the root of the dataset."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels of the upright picture; right and bottom are the first outside. What lies
    outside the picture is cut away."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of one split. Numbers are 0-based and global to the dataset; -1 is unknown."""

    path: str
    """Posix path below the root of its dataset; of a crop its name, which no file has."""
    identity: str
    """As in the source; the same string in every split means the same identity, but for UNKNOWN_IDENTITIES."""
    split: str
    """One of SPLITS."""
    camera: int = -1
    view: int = -1
    time: str = ""
    """When it was taken, as the source writes it; empty when unknown. Compared, never computed with."""
    lists: str = ""
    """VehicleID's test lists that hold the image ("800,1600,2400")."""
    attributes: tuple[tuple[str, str], ...] = ()
    """Further facts (colour, type), kept in the image's JSON beside it; nothing here reads them."""
    crop: Crop | None = None
    caption: str = ""
    """What the image shows, in words; kept in its JSON. No parser knows any: they come from a table of their own."""

    @property
    def file(self) -> str:
        """Where its pixels are."""
        return self.crop.file if self.crop else self.path
