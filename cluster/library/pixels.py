"""Images as a program has them -> batches of pixels of the size that the encoder takes.

    paths, PIL images, arrays, tensors; lists and iterators of them; a folder ──▶ [pixels] ──▶ ImageBatch ──▶ reid

Files are decoded as packed images are, everything is resized as they are, so an image has the same pixels by any way.
No more than a batch is read ahead of who takes them.
"""

import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shards.errors import DataError
from shards.format import IMAGE_ENDINGS
from shards.images import listing
from shards.images.pictures import BadPicture, picture_of
from shards.loading.decode import resize_into
from shards.loading.folder_images import FolderImages, read_image
from shards.loading.sequential import ImageBatch, SequentialLoader
from shards.storage import local_path, read_bytes

Path_ = str | os.PathLike[str]
OneImage = Path_ | Image.Image | np.ndarray | Tensor
Images = OneImage | Iterable[OneImage]
"""What `encode` takes. An array or tensor is uint8 RGB: [H, W, 3] or [3, H, W], or several with n in front."""


def batches(images: Images, image_size: tuple[int, int], batch_size: int, num_loaders: int) -> Iterator[ImageBatch]:
    """uint8 [b, 3, H, W] of size image_size, with the number of each image from 0.

    num_loaders: processes that decode the images of a folder.
    Raises DataError for an image that cannot be read, and for what is none.
    """
    if isinstance(images, str | os.PathLike) and is_folder(os.fspath(images)):
        folder = os.fspath(images)
        names = FolderImages(folder, listing.list_images(folder).images, image_size)
        yield from SequentialLoader(names, rank=0, world_size=1, batch_size=batch_size, num_loaders=num_loaders)
        return
    single, start = each(images), 0
    while read := list(islice(single, batch_size)):
        pixels = torch.empty(len(read), 3, *image_size, dtype=torch.uint8)
        for number, (image, place) in enumerate(zip(read, pixels.numpy(), strict=True), start):
            resize_into(place, pixels_of(image, number), "bilinear")
        yield ImageBatch(pixels, torch.arange(start, start + len(read)))
        start += len(read)


def is_folder(place: str) -> bool:
    """Whether a path or URL is a folder or zip file of images: what is remote and not named as an image is."""
    if place.lower().endswith(".zip"):
        return True
    local = local_path(place)
    return local.is_dir() if local else PurePosixPath(place).suffix.lower() not in IMAGE_ENDINGS


def list_images(folder: Path_) -> list[str]:
    """Paths of the images below a folder, in the order in which `encode` takes them. Raises DataError where there are
    none."""
    place = os.fspath(folder)
    return [f"{place.rstrip('/')}/{name}" for name in listing.list_images(place).images]


def each(images: Images) -> Iterator[OneImage]:
    """One by one. An array or tensor with four dimensions is several images, in an iterator too."""
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        yield from images
    elif isinstance(images, str | os.PathLike | Image.Image | np.ndarray | Tensor):
        yield images
    elif isinstance(images, Iterable):
        for image in images:
            yield from each(image)
    else:
        raise DataError(
            f"images: {type(images).__name__} is none of path, PIL image, uint8 array or tensor, or several of them"
        )


def pixels_of(image: Any, number: int) -> Tensor:
    """RGB, uint8 [3, height, width], of one image; `number` names it where it has no name."""
    if isinstance(image, str | os.PathLike):
        place = os.fspath(image)
        return read_image(place, partial(read_bytes, place))
    if isinstance(image, Image.Image):
        try:
            return torch.from_numpy(picture_of(image).pixels).permute(2, 0, 1)
        except BadPicture as error:
            raise DataError(f"image {number}: {image!r} can't be used ({error})") from error
    return _planes(image, number)


def _planes(array: np.ndarray | Tensor, number: int) -> Tensor:
    """The three channels first. Raises DataError where it cannot be told which they are."""
    what = f"image {number}: {type(array).__name__} {array.dtype} {tuple(array.shape)}"
    if array.dtype not in (np.uint8, torch.uint8):
        raise DataError(f"{what}: give values 0 ... 255 as uint8, before any normalisation")
    first, last = array.ndim == 3 and array.shape[0] == 3, array.ndim == 3 and array.shape[2] == 3
    if first == last or not all(array.shape):
        why = "has three values both first and last" if first else "is neither [H, W, 3] nor [3, H, W]"
        raise DataError(f"{what} {why}: give RGB as a PIL image, or in one of these shapes")
    pixels = array.cpu() if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    # Channels together in memory, as decoding gives them: for others torch's resize rounds in another order.
    return (pixels.permute(1, 2, 0).contiguous() if first else pixels).permute(2, 0, 1)
