"""Rendered vehicles in memory, with what can be said of them.

    shards.demo (looks, scene) ──▶ [pictures] ──▶ training, zero-shot check

An identity is a function of (seed, number), so a seed of its own makes identities that occur in no other set. The
pixels are those of a dataset on the disk: saved as JPEG, decoded and resized as a loader does.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from shards.demo.captions import describe
from shards.demo.dataset import in_processes
from shards.demo.looks import Looks, draw_looks
from shards.demo.scene import VIEWS, Sight, get_camera, take_photo
from shards.demo.vehicle import build_vehicle
from shards.loading.decode import decode, resize_into
from shards.progress import Progress, silent


@dataclass(frozen=True)
class PictureSettings:
    """All that decides the pictures."""

    seed: int
    identities: int
    images: int
    """Of each identity."""
    cameras: int
    size: int
    """Height and width, pixels."""
    interpolation: str = "bicubic"
    """As loaders resize: bicubic for training, bilinear for a check."""


@dataclass(frozen=True)
class Pictures:
    """n pictures, those of an identity side by side."""

    pixels: Tensor
    """uint8 [n, 3, size, size]."""
    looks: Sequence[Looks]
    sights: Sequence[Sight]

    def caption(self, row: int, rng: np.random.Generator, mirrored: bool = False) -> str:
        """Of one picture, or of its mirror image."""
        sight = self.sights[row]
        return describe(self.looks[row], mirror(sight) if mirrored else sight, rng)


def render(settings: PictureSettings, processes: int | None = None, progress: Progress = silent) -> Pictures:
    """Draw them; a pure function of the settings, whatever the number of processes."""
    pixels, looks, sights = [], [], []
    numbers = range(1, settings.identities + 1)
    for done, (own_pixels, own_looks, own_sights) in enumerate(
        in_processes(partial(_draw, settings), numbers, processes)
    ):
        pixels.append(torch.from_numpy(own_pixels))
        looks += [own_looks] * settings.images
        sights += own_sights
        progress((done + 1) * settings.images, settings.identities * settings.images)
    return Pictures(torch.cat(pixels), looks, sights)


def mirror(sight: Sight) -> Sight:
    """Of the picture whose left is right: seen from the other side. Marks are the same on both sides."""
    return Sight(VIEWS[-VIEWS.index(sight.view) % len(VIEWS)], sight.weather, sight.hidden, sight.light)


def _draw(settings: PictureSettings, identity: int) -> tuple[np.ndarray, Looks, list[Sight]]:
    looks = draw_looks(settings.seed, identity)
    model = build_vehicle(looks)
    pixels = np.empty((settings.images, 3, settings.size, settings.size), dtype=np.uint8)
    sights = []
    for number, out in enumerate(pixels):
        camera = ((identity - 1) * settings.images + number) % settings.cameras
        rng = np.random.default_rng((settings.seed, 4, identity, number))
        photo = take_photo(model, get_camera(settings.seed, camera), rng)
        file = io.BytesIO()
        photo.image.save(file, "JPEG", quality=photo.quality)
        resize_into(out, decode(np.frombuffer(file.getvalue(), dtype=np.uint8)), settings.interpolation)
        sights.append(photo.sight)
    return pixels, looks, sights
