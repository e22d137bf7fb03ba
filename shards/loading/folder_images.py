"""A plain folder of images in the order of their names: for extraction without packing.

    folder, zip or URL ──▶ [folder images] ──▶ sequential loader

Decoded and resized as packed images are, so an image has the same pixels either way.
"""

from contextlib import AbstractContextManager, nullcontext

import numpy as np

from shards.errors import DataError, StoreError
from shards.loading.decode import decode, resize_into
from shards.storage import Source


class FolderImages:
    """The images `names` below a folder; `OrderedImages`."""

    def __init__(self, root: str, names: list[str], image_size: tuple[int, int]):
        """names: paths below the root. image_size: (H, W), pixels."""
        self.source, self.names, self.image_size = Source(root), names, image_size

    def __len__(self) -> int:
        return len(self.names)

    def read_into(self, out: np.ndarray, start: int, stop: int) -> None:
        """Raises DataError that names the file, and StoreError where the store fails and not the image."""
        for name, place in zip(self.names[start:stop], out, strict=True):
            try:
                image = decode(np.frombuffer(self.source.read(name), np.uint8))
            except StoreError:
                raise
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{self.source.root}/{name}: can't be read as an image ({error}); repair it, or take it out"
                ) from error
            resize_into(place, image, "bilinear")

    def fetching_ahead(self, start: int, stop: int) -> AbstractContextManager[None]:
        """Nothing is: a file is asked for when it is read."""
        return nullcontext()
