"""Features as a trained encoder gives them: queries and a gallery of a published dataset's size."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipreid.retrieval.positives import Labels
from launch.cli import Parser, positive


@dataclass(frozen=True)
class Size:
    queries: int
    gallery: int
    identities: int
    cameras: int
    width: int = 1280


SIZES = {"market": Size(3_368, 15_913, 750, 6), "msmt17": Size(11_659, 82_161, 3_060, 15)}
DIRECTIONS = 96
"""In which identities differ: what a trained encoder tells apart lies in far fewer dimensions than its features."""
CAMERA, IMAGE, NOISE = 0.45, (0.3, 1.8), 0.3
"""Spread of cameras, of images of one identity (from the clearest to the worst), and in all dimensions alike, that of
identities being 1."""
ROWS = 4096

Allocate = Callable[[int, int], Tensor]
"""float32 [n, width], to be filled."""


def add_size_options(parser: Parser, sizes: dict[str, Size]) -> None:
    parser.add_argument("--size", choices=sorted(sizes), default="market", help="of a dataset (default market)")
    for name in ("queries", "gallery", "identities", "cameras", "width"):
        parser.add_argument(f"--{name}", type=positive, metavar="N", help="in place of the size's")


def chosen_size(options: Any, sizes: dict[str, Size]) -> Size:
    size = sizes[options.size]
    return replace(size, **{name: value for name in asdict(size) if (value := getattr(options, name))})


def make_sets(size: Size, allocate_gallery: Allocate = torch.empty) -> list[tuple[Tensor, Labels]]:
    """Features of length 1, float32 [n, width], of queries and gallery, and their labels."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(DIRECTIONS, size.width, generator=generator) / DIRECTIONS**0.5
    centres = torch.randn(size.identities, DIRECTIONS, generator=generator)
    shifts = CAMERA * torch.randn(size.cameras, DIRECTIONS, generator=generator)
    sets = []
    for n, allocate in ((size.queries, torch.empty), (size.gallery, allocate_gallery)):
        identity = torch.randint(size.identities, (n,), generator=generator)
        camera = torch.randint(size.cameras, (n,), generator=generator)
        features = allocate(n, size.width)
        for rows in torch.arange(n).split(ROWS):
            clear = torch.empty(len(rows), 1).uniform_(*IMAGE, generator=generator)
            image = clear * torch.randn(len(rows), DIRECTIONS, generator=generator)
            noise = NOISE * torch.randn(len(rows), size.width, generator=generator)
            own = centres[identity[rows]] + shifts[camera[rows]] + image
            features[rows] = normalize(own @ directions + noise)
        sets.append((features, Labels(identity.numpy(), camera.numpy())))
    return sets


def mapped(path: str) -> Allocate:
    """Features in a file that is mapped into memory, as those of a feature file are."""
    return lambda n, width: torch.from_numpy(np.lib.format.open_memmap(path, "w+", np.float32, (n, width)))
