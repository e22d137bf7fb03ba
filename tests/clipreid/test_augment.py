"""Augmentation: pixels against a per-image pipeline, choices against their distributions."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from clipreid.augment import (
    Choices,
    augment,
    carry_out,
    draw,
    noise_table,
    normalise,
)
from tests.helpers.devices import DEVICE, on_gpu
from tests.helpers.distributions import ks_distance
from tests.helpers.settings import augment_settings
from tests.helpers.tolerances import close

SETTINGS = augment_settings(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
ROUNDING = 1e-5  # The next pixel value is 2e-2 away.
STEP = {"seed": 3, "epoch": 2, "epoch_step": 5}


def random_images(count, height=64, width=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def one_image(image, choices, i, settings):
    """The published pipeline for a single image, through PIL and torchvision, with the choices forced."""
    height, width = image.shape[1:]
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if choices.flip[i]:
        picture = TF.hflip(picture)
    picture = TF.pad(picture, settings.pad, fill=0)
    picture = TF.crop(picture, int(choices.crop_top[i]), int(choices.crop_left[i]), height, width)
    pixels = TF.normalize(TF.to_tensor(picture), settings.mean, settings.std)
    place = [int(x[i]) for x in (choices.erase_top, choices.erase_left, choices.erase_height, choices.erase_width)]
    if not place[2]:
        return pixels
    start = int(choices.noise[i])
    noise = noise_table(image.numel(), image.device)[start : start + image.numel()].view_as(image)
    return TF.erase(pixels, *place, TF.crop(noise, *place))


@pytest.mark.parametrize("settings", [SETTINGS, augment_settings(pad=0), augment_settings(flip=1.0, erase=1.0, pad=3)])
def test_pixels_equal_a_per_image_pipeline_with_the_same_choices(settings):
    images, positions = random_images(40), torch.arange(40)
    choices = draw(positions, (64, 32), settings=settings, **STEP)
    out = augment(images, positions, settings=settings, **STEP)
    for i, image in enumerate(images):
        close(out[i], one_image(image, choices, i, settings), atol=ROUNDING)
    assert settings.erase == 0 or (choices.erase_height > 0).any()


def test_forced_choices_are_carried_out_to_the_pixel():
    """A mirrored image, moved down by 2 and right by 1 out of the margin, with a 1 x 2 hole."""
    settings = augment_settings(pad=4, mean=(0, 0, 0), std=(1 / 255,) * 3)
    image = torch.arange(1, 13, dtype=torch.uint8).view(1, 1, 3, 4).expand(1, 3, 3, 4)
    places = {"crop_top": 2, "crop_left": 3, "erase_top": 2, "erase_left": 2, "erase_height": 1, "erase_width": 2}
    values = {"flip": True, **places, "noise": 7}
    out = carry_out(Choices(**{name: torch.tensor([value]) for name, value in values.items()}), image, settings)
    noise = noise_table(36, torch.device("cpu"))[7 + 10 : 7 + 12].tolist()
    expected = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [0, 4, *noise]])
    close(out[0, 0], expected, rtol=1.3e-6, atol=1e-5)


def test_normalise_equals_torchvision():
    images = random_images(2)
    expected = torch.stack([TF.normalize(image.float() / 255, SETTINGS.mean, SETTINGS.std) for image in images])
    close(normalise(images, SETTINGS.mean, SETTINGS.std), expected, atol=ROUNDING)


def test_an_image_does_not_depend_on_who_else_is_in_the_part():
    """Two ranks, or ranks that hold every other image, see the pixels that one process sees."""
    images, positions = random_images(24), torch.arange(100, 124)
    whole = augment(images, positions, settings=SETTINGS, **STEP)
    for part in (slice(0, 11), slice(11, 24), slice(0, 24, 2), torch.tensor([5, 3, 3])):
        assert torch.equal(augment(images[part], positions[part], settings=SETTINGS, **STEP), whole[part])


def test_an_image_in_two_places_is_augmented_twice():
    image = random_images(1).expand(2, -1, -1, -1)
    first, second = augment(image, torch.tensor([0, 1]), settings=SETTINGS, **STEP)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("changed", ["seed", "epoch", "epoch_step"])
def test_seed_epoch_and_step_each_change_the_choices(changed):
    positions = torch.arange(64)
    before = draw(positions, (256, 128), settings=SETTINGS, **STEP)
    after = draw(positions, (256, 128), settings=SETTINGS, **{**STEP, changed: STEP[changed] + 1})
    assert (before.noise == after.noise).sum() < 3 and not torch.equal(before.flip, after.flip)


def many_choices(size, count=60_000):
    """Choices of 300 steps of 200 images."""
    parts = [
        draw(torch.arange(200), size, seed=1, epoch=1, epoch_step=step, settings=augment_settings())
        for step in range(count // 200)
    ]
    return Choices(*(torch.cat([getattr(p, name) for p in parts]) for name in Choices.__dataclass_fields__))


def test_flips_and_crop_offsets_are_uniform():
    choices = many_choices((256, 128))
    n = len(choices.flip)
    assert abs(choices.flip.double().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    for offset in (choices.crop_top, choices.crop_left):
        counts = offset.bincount().double()
        assert len(counts) == 21
        chi_squared = ((counts - n / 21).square() / (n / 21)).sum()
        assert chi_squared < 20 + 4 * math.sqrt(40)
    together = torch.stack([choices.flip, choices.crop_top, choices.crop_left, choices.erase_height > 0]).double()
    assert (torch.corrcoef(together) - torch.eye(4)).abs().max() < 0.02


def test_half_of_the_images_are_erased_with_uniform_area_and_log_uniform_aspect():
    """On a square of 1000 pixels a rectangle below a quarter of the area always fits."""
    choices = many_choices((1000, 1000))
    erased = choices.erase_height > 0
    assert abs(erased.double().mean() - 0.5) < 4 * 0.5 / math.sqrt(len(erased))
    height, width = choices.erase_height[erased].numpy(), choices.erase_width[erased].numpy()
    area, log_aspect = height * width / 1e6, np.log(height / width)
    assert area.min() > 0.0195 and area.max() < 0.335 and np.abs(log_aspect).max() < math.log(1 / 0.3) + 0.02
    small = area < 0.25
    critical = 1.95 / math.sqrt(small.sum())  # significance 0.001
    assert ks_distance(area[small], lambda x: (x - 0.02) / 0.23) < critical
    bound = math.log(1 / 0.3)
    assert ks_distance(log_aspect[small], lambda x: (x + bound) / (2 * bound)) < critical + 0.005  # whole pixels


def test_erased_rectangles_have_the_distribution_of_drawing_again_until_one_fits():
    """256 x 128, where tall and wide rectangles often do not fit: against the usual loop over attempts."""
    rng, expected = np.random.default_rng(0), []
    while len(expected) < 30_000:
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * 256 * 128
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < 256 and w < 128:
                expected.append((rng.integers(256 - h + 1), rng.integers(128 - w + 1), h, w))
                break
    choices = many_choices((256, 128))
    rows = choices.erase_height > 0
    ours = torch.stack([choices.erase_top, choices.erase_left, choices.erase_height, choices.erase_width], 1)[rows]
    for column, reference in zip(ours.T.numpy(), np.array(expected).T, strict=True):
        ordered, n = np.sort(reference), len(reference)
        both = np.arange(257)
        ours_cdf = np.searchsorted(np.sort(column), both, side="right") / len(column)
        distance = np.abs(ours_cdf - np.searchsorted(ordered, both, side="right") / n).max()
        assert distance < 1.95 * math.sqrt(1 / n + 1 / len(column))


@pytest.mark.parametrize("size", [(256, 128), (32, 200), (8, 8), (3, 3)])
def test_every_choice_stays_inside_the_image(size):
    choices = draw(torch.arange(4000), size, settings=augment_settings(erase=1.0), **STEP)
    assert (choices.erase_top + choices.erase_height).max() <= size[0]
    assert (choices.erase_left + choices.erase_width).max() <= size[1]
    assert min(getattr(choices, name).min() for name in Choices.__dataclass_fields__) >= 0
    assert choices.noise.max() + 3 * size[0] * size[1] <= len(noise_table(3 * size[0] * size[1], torch.device("cpu")))


def test_erased_pixels_are_independent_normal_noise():
    """Moments over a batch, and no correlation of two images, two channels or neighbouring pixels."""
    settings = augment_settings(flip=0, pad=0, erase=1.0)
    black = torch.zeros(64, 3, 128, 64, dtype=torch.uint8)
    choices = draw(torch.arange(64), (128, 64), settings=settings, **STEP)
    whole = torch.zeros_like(choices.noise)
    everything = {"erase_top": whole, "erase_left": whole, "erase_height": whole + 128, "erase_width": whole + 64}
    noise = carry_out(Choices(**{**vars(choices), **everything}), black, settings)
    n = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(n) * 2  # windows may overlap: twice the deviation of fresh noise
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / n) * 2
    assert abs(noise.pow(3).mean()) < 0.03 and abs(noise.pow(4).mean() - 3) < 0.06
    images = torch.corrcoef(noise.flatten(1)) - torch.eye(64)
    assert images.abs().max() < 5.5 / math.sqrt(noise[0].numel())  # 2016 pairs
    channels = noise.transpose(0, 1).flatten(1)
    assert (torch.corrcoef(channels) - torch.eye(3)).abs().max() < 0.01
    assert abs((noise[..., 1:] * noise[..., :-1]).mean()) < 0.01


@on_gpu
def test_a_gpu_gives_the_same_pixels():
    images, positions = random_images(64, 256, 128), torch.arange(64)
    expected = augment(images, positions, settings=SETTINGS, **STEP)
    out = augment(images.to(DEVICE), positions.to(DEVICE), settings=SETTINGS, **STEP)
    close(out, expected, atol=ROUNDING)
