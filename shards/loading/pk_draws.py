"""Random choices of the PK sampler: identities for batches, and images cut into groups of K.

    index ──▶ pk_sampler [draws] ──▶ PK loader

Pure functions of their generator. Only `Generator.random` is drawn from: numpy may change what its other methods make
of the same bits, and a resumed run would then see other batches. All numbers that a function needs are drawn at once,
so that its loops may be written in any way without changing what they mean.
"""

from collections.abc import Callable, Iterator
from itertools import chain, islice, zip_longest

import numpy as np

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


def draw_until_used(groups: list[int], batch_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Draw `batch_size` different identities per step among those with groups left, until fewer are left.

    groups: of each identity. Returns the numbers of the identities of each step. A step is the start of a Fisher-Yates
    shuffle of the identities that are left: every choice and order of them is equally likely, at a cost that does not
    depend on their number.
    """
    left, remaining = list(range(len(groups))), list(groups)
    steps = []
    for numbers in rng.random((sum(groups) // batch_size, batch_size)).tolist():
        num_left = len(left)
        if num_left < batch_size:
            break
        for place, number in enumerate(numbers):
            chosen = place + int(number * (num_left - place))
            left[place], left[chosen] = left[chosen], left[place]
        steps.append(left[:batch_size])
        for place in range(batch_size - 1, -1, -1):
            identity = left[place]
            remaining[identity] -= 1
            if not remaining[identity]:
                left[place] = left[-1]
                left.pop()
    return steps


def draw_weighted(weights: np.ndarray, batch_size: int, num_steps: int, rng: np.random.Generator) -> list[list[int]]:
    """Draw `batch_size` different identities per step, one after another with probability proportional to weights.

    weights: float [identities], positive. Returns the numbers of the identities of each step. Drawing with replacement
    and passing over repeats is drawing without replacement; where too few different ones came, exponential clocks,
    which have no memory, tell which of the others come next.
    """
    if not num_steps:
        return []
    ends = np.cumsum(weights)
    tries = np.searchsorted(ends / ends[-1], rng.random((num_steps, 2 * batch_size)), side="right")
    steps = []
    for numbers in tries.tolist():
        drawn = list(dict.fromkeys(numbers))[:batch_size]
        if missing := batch_size - len(drawn):
            clocks = -np.log1p(-rng.random(len(weights))) / weights
            clocks[drawn] = np.inf
            drawn += np.argsort(clocks, kind="stable")[:missing].tolist()
        steps.append(drawn)
    return steps


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
