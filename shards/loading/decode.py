"""Image bytes as a file holds them -> RGB pixels of the size the encoder takes.

    reader ──▶ [decode] ──▶ uint8 batch of the PK loader and of the sequential loader, pictures

Decoded as `pictures.py` says, for packing and reading alike. torch resizes: its antialiased resize of uint8 works as
Pillow's does (within 2 grey levels, the mean within 0.5) and several times as fast.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from shards.errors import DataError
from shards.images.pictures import BadPicture, read_picture
from shards.loading.index import ShardIndex, SplitIndex
from shards.loading.reader import RowReader


def decode(data: np.ndarray) -> Tensor:
    """An image file's bytes, uint8 [size] -> RGB, uint8 [3, height, width].

    Raises BadPicture when the bytes are no whole image.
    """
    return torch.from_numpy(read_picture(data).pixels).permute(2, 0, 1)


def resize_into(out: np.ndarray, image: Tensor, interpolation: str) -> None:
    """Resize uint8 [3, height, width] to the size of `out`, uint8 [3, H, W].

    interpolation: "bicubic" or "bilinear", antialiased as Pillow's.
    """
    (height, width), (new_height, new_width) = image.shape[1:], out.shape[1:]
    # A batch of one whose strides are those of channels last, so that torch keeps the channels together throughout.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    sizes = [(new_height, new_width)]
    if interpolation == "bicubic" and new_height < height and height - new_height > 2 * (width - new_width):
        # Bicubic overshoots and is clipped after each pass, so their order shows. torch starts with the horizontal
        # one; Pillow does not when much more height than width is taken away.
        sizes.insert(0, (new_height, width))
    for size in sizes if (height, width) != sizes[-1] else ():
        batch = interpolate(batch, size, mode=interpolation, antialias=True)
    np.copyto(out, batch[0].numpy())  # to planes, which numpy does twice as fast as torch


def decode_row(
    split: SplitIndex,
    row: int,
    data: np.ndarray | DataError,
    out: np.ndarray,
    interpolation: str,
    remedy: str = "repair or drop the source image and re-pack",
) -> None:
    """Decode and resize what was read for a row into `out`, uint8 [3, H, W].

    Raises the error that was read, and DataError that names shard and key where the bytes are no whole image.
    """
    if isinstance(data, DataError):
        raise data
    try:
        image = decode(data)
    except BadPicture as error:
        raise DataError(f"{split.where(row)}: can't be decoded ({error}); {remedy}") from error
    resize_into(out, image, interpolation)


def pick_images(index: ShardIndex, split: str, rows: Sequence[int], image_size: tuple[int, int]) -> Tensor:
    """A few images for pictures: uint8 [n, 3, H, W] of these rows of the split, in their order.

    They are decoded as sequential passes decode them. Raises DataError naming shard and key.
    """
    rows_of = index.split(split)
    reader = RowReader(rows_of, cache=None, fetch=False)
    images = torch.empty(len(rows), 3, *image_size, dtype=torch.uint8)
    try:
        for row, data, out in zip(rows, reader.read(rows), images.numpy(), strict=True):
            decode_row(rows_of, row, data, out, "bilinear")
    finally:
        reader.release()
    return images
