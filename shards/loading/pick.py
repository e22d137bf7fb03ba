"""A few images of a split by row number, for pictures.

index + shards -> [pick] -> uint8 images, decoded as sequential passes decode them
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shards.errors import DataError
from shards.loading.decode import decode, resize_into
from shards.loading.index import ShardIndex
from shards.loading.reader import RowReader


def pick_images(index: ShardIndex, split: str, rows: Sequence[int], image_size: tuple[int, int]) -> Tensor:
    """uint8 [n, 3, H, W] of these rows of the split, in their order. Raises DataError naming shard and key."""
    rows_of = index.split(split)
    reader = RowReader(rows_of, cache=None, fetch=False)
    images = torch.empty(len(rows), 3, *image_size, dtype=torch.uint8)
    try:
        for row, data, out in zip(rows, reader.read(rows), images.numpy(), strict=True):
            if isinstance(data, DataError):
                raise data
            try:
                resize_into(out, decode(data), "bilinear")
            except ValueError as error:
                raise DataError(f"{rows_of.where(row)}: can't be decoded ({error}); repair it and re-pack") from error
    finally:
        reader.release()
    return images
