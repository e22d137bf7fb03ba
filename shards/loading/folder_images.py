"""A plain folder of images in the order of their names: for extraction without packing.

    folder, zip or URL ──▶ [folder images] ──▶ sequential loader

Decoded and resized as packed images are, so an image has the same pixels either way.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
from torch import Tensor

from shards.errors import DataError, StoreError
from shards.loading.decode import decode, resize_into
from shards.storage import Source


def read_image(where: str, read: Callable[[], bytes]) -> Tensor:
    """RGB, uint8 [3, height, width], of the file that `read` gives. Raises DataError that names it by `where`, and
    StoreError where the store fails and not the image."""
    try:
        return decode(np.frombuffer(read(), np.uint8))
    except StoreError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: can't be read as an image ({error}); repair it, or take it out") from error


class FolderImages:
    """The images `names` below a folder; `OrderedImages`."""

    def __init__(self, root: str, names: list[str], image_size: tuple[int, int]):
        """names: paths below the root. image_size: (H, W), pixels."""
        self.source, self.names, self.image_size = Source(root), names, image_size

    def __len__(self) -> int:
        return len(self.names)

    def read_into(self, out: np.ndarray, start: int, stop: int) -> None:
        """Raises as `read_image`."""
        for name, place in zip(self.names[start:stop], out, strict=True):
            image = read_image(f"{self.source.root}/{name}", partial(self.source.read, name))
            resize_into(place, image, "bilinear")

    def fetching_ahead(self, start: int, stop: int) -> AbstractContextManager[None]:
        """Nothing is: a file is asked for when it is read."""
        return nullcontext()
