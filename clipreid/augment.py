"""Augmentation of a batch on the device it is trained on: flip, crop, normalisation, random erasing.

    loader (uint8, resized) ──▶ [augment: flip, pad and crop, normalise, erase] ──▶ ReIDModel in training
    loader (uint8, resized) ──▶ [augment: normalise] ──▶ ReIDModel in evaluation

Every random choice is a hash of (seed, epoch, step of the epoch, the image's position in the global batch), so the
pixels do not depend on how many ranks share the batch, and there is no generator whose state would have to be saved.
`draw` makes the choices, `carry_out` does what they say; neither makes the host wait for a GPU.

b = images, T = attempts to place a rectangle
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from clipreid.counter_random import uniforms

ERASE_AREA = (0.02, 1 / 3)  # of the image's area, uniform
ERASE_ASPECT = (0.3, 1 / 0.3)  # height / width, uniform in the logarithm
ERASE_ATTEMPTS = 10  # a rectangle that does not fit is drawn again; if none of these fits, nothing is erased
NOISE_WINDOWS = 2**20
CPU_CHUNK = 8  # images at a time: the temporaries stay in the cache, which is twice as fast as all at once


@dataclass(frozen=True)
class AugmentSettings:
    flip: float
    """Probability of mirroring an image."""
    pad: int
    """Black pixels added on each side before the crop back to the original size."""
    erase: float
    """Probability of replacing a rectangle by N(0, 1) noise, after normalisation."""
    mean: Sequence[float]
    """Per channel, of pixels in 0 … 1."""
    std: Sequence[float]
    """Per channel, of pixels in 0 … 1."""


@dataclass(frozen=True)
class Choices:
    """What happens to each of b images: `flip` is bool [b], everything else int64 [b] in pixels."""

    flip: Tensor
    crop_top: Tensor
    """Of the padded image, 0 … 2 pad."""
    crop_left: Tensor
    erase_top: Tensor
    erase_left: Tensor
    erase_height: Tensor
    """0 where nothing is erased."""
    erase_width: Tensor
    noise: Tensor
    """Where in `noise_table` the image's 3 * H * W values begin."""

    def of(self, rows: slice) -> "Choices":
        return Choices(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def augment(
    images: Tensor, positions: Tensor, *, seed: int, epoch: int, epoch_step: int, settings: AugmentSettings
) -> Tensor:
    """uint8 [b, 3, H, W] and their places in the global batch, int64 [b] -> float32 [b, 3, H, W], normalised."""
    height, width = images.shape[2:]
    choices = draw(
        positions.to(images.device), (height, width), seed=seed, epoch=epoch, epoch_step=epoch_step, settings=settings
    )
    return carry_out(choices, images, settings)


def draw(
    positions: Tensor, size: tuple[int, int], *, seed: int, epoch: int, epoch_step: int, settings: AugmentSettings
) -> Choices:
    """The random choices for images of `size` (H, W) at these places (int64 [b]) of a global batch."""
    height, width = size
    uniform = uniforms(positions, (seed, epoch, epoch_step), 5 + 4 * ERASE_ATTEMPTS)
    crop = _integers(uniform[:, 1:3], 2 * settings.pad + 1)
    erase = _rectangles(uniform[:, 5:].unflatten(1, (4, ERASE_ATTEMPTS)).unbind(1), height, width)
    erased = (uniform[:, 3] < settings.erase).long()
    return Choices(
        flip=uniform[:, 0] < settings.flip,
        crop_top=crop[:, 0],
        crop_left=crop[:, 1],
        erase_top=erase[0],
        erase_left=erase[1],
        erase_height=erase[2] * erased,
        erase_width=erase[3] * erased,
        noise=_integers(uniform[:, 4], NOISE_WINDOWS),
    )


def carry_out(choices: Choices, images: Tensor, settings: AugmentSettings) -> Tensor:
    """What was chosen, done to the images: uint8 [b, 3, H, W] -> float32 [b, 3, H, W]."""
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    chunk = CPU_CHUNK if images.device.type == "cpu" else len(images)
    for start in range(0, len(images), chunk):
        rows = slice(start, start + chunk)
        own = choices.of(rows)
        out[rows] = _flip_and_crop(images[rows], own, settings.pad)
        _normalise_(out[rows], settings.mean, settings.std)
        _erase_(out[rows], own)
    return out


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The test transform of resized images: uint8 [b, 3, H, W] -> float32, (pixel / 255 - mean) / std."""
    return _normalise_(images.float(), mean, std)


@functools.lru_cache(maxsize=8)
def noise_table(pixels: int, device: torch.device) -> Tensor:
    """Fixed N(0, 1) values, NOISE_WINDOWS + pixels of them: an image's noise is the window at its offset.

    A window is copied ten times faster than fresh noise is made on a CPU. Windows of two images that overlap show the
    same values at other places, so pixels at the same place stay independent.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NOISE_WINDOWS + pixels, generator=generator).to(device)


def _flip_and_crop(images: Tensor, choices: Choices, pad: int) -> Tensor:
    """Each image and its mirror image are laid side by side with black margins; a crop is a window into one of them.

    One strided copy per crop, on any device, where indexing pixel by pixel would need an index per pixel.
    """
    b, channels, height, width = images.shape
    canvas = images.new_zeros(b, 2, channels, height + 2 * pad, width + 2 * pad)
    inner = canvas[..., pad : pad + height, pad : pad + width]
    inner[:, 0] = images
    inner[:, 1] = images.flip(-1)
    plane, row = canvas.stride(2), canvas.stride(3)
    side = 2 * torch.arange(b, device=images.device) + choices.flip
    start = side * canvas.stride(1) + choices.crop_top * row + choices.crop_left
    window = (channels - 1) * plane + (height - 1) * row + width
    windows = canvas.view(-1).as_strided((canvas.numel() - window + 1, *images.shape[1:]), (1, plane, row, 1))
    return windows.index_select(0, start)


def _normalise_(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), pixels.device)
    return pixels.mul_(scale).add_(shift)


@functools.lru_cache(maxsize=8)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(pixel / 255 - mean) / std as one product and one sum. Kept, since each copy to a GPU is a synchronisation."""
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    return scale[:, None, None].to(device), shift[:, None, None].to(device)


def _erase_(images: Tensor, choices: Choices) -> None:
    pixels, (height, width) = images[0].numel(), images.shape[2:]
    windows = noise_table(pixels, images.device).unfold(0, pixels, 1)
    noise = windows.index_select(0, choices.noise).view_as(images)
    rows = _inside(choices.erase_top, choices.erase_height, height)[:, None, :, None]
    columns = _inside(choices.erase_left, choices.erase_width, width)[:, None, None, :]
    erased = rows * columns
    images.mul_(1 - erased).addcmul_(noise, erased)  # exact, and several times faster than torch.where


def _inside(start: Tensor, length: Tensor, size: int) -> Tensor:
    """1.0 where start <= place < start + length, else 0.0. float32 [b, size]."""
    place = torch.arange(size, device=start.device)
    return ((place >= start[:, None]) & (place < (start + length)[:, None])).float()


def _rectangles(uniforms: Sequence[Tensor], height: int, width: int) -> tuple[Tensor, ...]:
    """The first of T drawn rectangles that fits: top, left, height, width, int64 [b], all 0 where none fits.

    uniforms: of area, aspect, top and left, float64 [b, T] each.
    """
    area_u, aspect_u, top_u, left_u = uniforms
    area = (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area_u) * (height * width)
    low, high = (math.log(aspect) for aspect in ERASE_ASPECT)
    aspect = (low + (high - low) * aspect_u).exp()
    rows = (area * aspect).sqrt().round().long()
    columns = (area / aspect).sqrt().round().long()
    fits = (rows < height) & (columns < width)
    first = fits.long().argmax(1, keepdim=True)
    drawn = (_integers(top_u, height - rows + 1), _integers(left_u, width - columns + 1), rows, columns)
    return tuple((value * fits).gather(1, first).squeeze(1) for value in drawn)


def _integers(uniform: Tensor, count: Tensor | int) -> Tensor:
    """Uniform on 0 … count - 1."""
    return (uniform * count).long()
