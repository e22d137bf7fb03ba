"""The PK sampler's draws as plain loops over identities, which read like the rule: what `pk_draws` has to give.

Numbers are drawn from the generator in the same order, so that plans are equal bit for bit.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice, zip_longest

import numpy as np

from shards.loading.index import SplitIndex
from shards.loading.pk_draws import draw_until_used, draw_weighted
from shards.loading.pk_sampler import PKSettings

Images = dict[int, list[int]]
"""The rows of each identity's images, ascending; identities ascending too."""
Groups = dict[int, list[list[int]]]
"""Groups of K rows of each identity."""
Cut = Callable[[Images, int, np.random.Generator], Groups]
"""cut(images, K, rng): an identity with c images gets max(c // K, 1) groups."""
UNKNOWN_CAMERA = 1 << 40
"""Above every camera's number."""


def num_groups(num_images: int, size: int) -> int:
    """Groups of K that an identity's images are cut into; one with fewer than K images fills one group."""
    return max(num_images // size, 1)


def identity_groups(images: Images, size: int, rng: np.random.Generator) -> Groups:
    """Shuffle each identity's images and cut them into groups of K; a `Cut`.

    A remainder is dropped; an identity with fewer than K images is sampled with replacement to K.
    """
    order = _image_order(images, rng)
    replacements = _numbers_for_few(images, size, rng)
    groups = {}
    for identity, rows in images.items():
        rows = sorted(rows, key=order.__getitem__)
        if len(rows) < size:
            rows = [rows[int(number * len(rows))] for number in next(replacements)]
        groups[identity] = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    return groups


def camera_groups(cameras: list[int], images: Images, size: int, rng: np.random.Generator) -> Groups:
    """Cut each identity's images into groups of K that hold as many of its cameras as they can; a `Cut`.

    cameras: of each row of the split; an unknown camera (-1) is unlike any other. Each image is used at most once. A
    remainder is dropped from the cameras with the most images. The kept images are dealt to the groups in turn, camera
    after camera: a camera with m images then is in min(m, groups) groups, which is the most it can be. An identity
    with fewer than K images gives all of them, and the rest again, with replacement.
    """
    by_camera = {identity: _by_camera(rows, cameras) for identity, rows in images.items()}
    camera_order = iter(rng.random(sum(map(len, by_camera.values()))).tolist())
    order = _image_order(images, rng)
    group_order = iter(rng.random(sum(num_groups(len(rows), size) for rows in images.values())).tolist())
    replacements = _numbers_for_few(images, size, rng)
    groups = {}
    for identity, rows in images.items():
        shuffled = _in_order([sorted(own, key=order.__getitem__) for own in by_camera[identity]], camera_order)
        if len(rows) < size:
            dealt = _dealt(shuffled, len(rows), 1)
            again = [dealt[int(number * len(rows))] for number in next(replacements)]
            groups[identity] = _in_order([dealt + again[len(rows) :]], group_order)
        else:
            count = len(rows) // size
            dealt = _dealt(shuffled, count * size, count)
            groups[identity] = _in_order([dealt[group::count] for group in range(count)], group_order)
    return groups


def _dealt(shuffled: list[list[int]], num_kept: int, count: int) -> list[int]:
    """The rows of an identity's cameras in the order in which they are dealt to `count` groups in turn.

    Cameras with as many images as there are groups go first, so that the others fill the groups evenly.
    """
    if num_kept < sum(map(len, shuffled)):
        turns = (row for turn in zip_longest(*shuffled) for row in turn if row is not None)
        kept = set(islice(turns, num_kept))
        shuffled = [[row for row in rows if row in kept] for rows in shuffled]
    in_all_groups_first = sorted(shuffled, key=lambda rows: len(rows) < count)
    return [*chain.from_iterable(in_all_groups_first)]


def _by_camera(rows: list[int], cameras: list[int]) -> list[list[int]]:
    """The rows of each camera, by its number; then those of unknown cameras, each by itself."""
    found: dict[int, list[int]] = {}
    for row in rows:
        camera = cameras[row]
        found.setdefault(camera if camera >= 0 else UNKNOWN_CAMERA + row, []).append(row)
    return [found[camera] for camera in sorted(found)]


def _image_order(images: Images, rng: np.random.Generator) -> dict[int, float]:
    """A random number for each row, drawn in the order of the rows."""
    rows = sorted(chain.from_iterable(images.values()))
    return dict(zip(rows, rng.random(len(rows)).tolist(), strict=True))


def _numbers_for_few(images: Images, size: int, rng: np.random.Generator) -> Iterator[list[float]]:
    """K random numbers for each identity with fewer than K images, in their order."""
    num_few = sum(len(rows) < size for rows in images.values())
    return iter(rng.random((num_few, size)).tolist())


def _in_order(lists: list[list[int]], numbers: Iterator[float]) -> list[list[int]]:
    """Sorted by the next of the random numbers, one for each."""
    return [rows for _, rows in sorted(zip(islice(numbers, len(lists)), lists, strict=True))]


def plain_plan(
    split: SplitIndex, rows: np.ndarray, settings: PKSettings, batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Batches of `batch_size` identities from some rows of the split, ascending; int64 [steps, batch_size, K]."""
    images: Images = {label: [] for label in np.unique(split.labels[rows]).tolist()}
    for row, label in zip(rows.tolist(), split.labels[rows].tolist(), strict=True):
        images[label].append(row)
    size = settings.images_per_identity
    groups = [num_groups(len(own), size) for own in images.values()]
    if settings.strategy == "balanced":
        num_steps = sum(groups) // batch_size if len(groups) >= batch_size else 0
        weights = np.array([len(own) for own in images.values()]) ** settings.balance_alpha
        steps = draw_weighted(weights, batch_size, num_steps, rng)
    else:
        steps = draw_until_used(groups, batch_size, rng)
    cut: Cut = identity_groups
    if settings.strategy == "camera_aware":
        cut = partial(camera_groups, split.cameras.tolist())
    labels = list(images)
    drawn = [labels[number] for step in steps.tolist() for number in step]
    return np.array(_groups_of(drawn, images, size, cut, rng), np.int64).reshape(-1, batch_size, size)


def _groups_of(drawn: list[int], images: Images, size: int, cut: Cut, rng: np.random.Generator) -> list[list[int]]:
    """The rows of every drawn identity: its next group, and its images are cut anew when it has used all of them."""
    counts = {identity: num_groups(len(rows), size) for identity, rows in images.items()}
    times_drawn = dict.fromkeys(images, 0)
    rounds: list[list[tuple[int, int, int]]] = []  # (place in `drawn`, identity, group), of each cutting
    for place, identity in enumerate(drawn):
        number, group = divmod(times_drawn[identity], counts[identity])
        times_drawn[identity] += 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append((place, identity, group))
    found: list[list[int]] = [[]] * len(drawn)
    for uses in rounds:
        used = sorted({identity for _, identity, _ in uses})
        groups = cut({identity: images[identity] for identity in used}, size, rng)
        for place, identity, group in uses:
            found[place] = groups[identity][group]
    return found
