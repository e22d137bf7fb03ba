"""Random choices of the PK sampler: identities for batches, and images cut into groups of K.

    index ──▶ pk_sampler [draws] ──▶ PK loader

Pure functions of their generator. Only `Generator.random` is drawn from: numpy may change what its other methods make
of the same bits, and a resumed run would then see other batches. All numbers that a function needs are drawn at once,
so that the work may be done in any order without changing what they mean.

An epoch of 20,000,000 images is planned in seconds because identities with equally many images are cut together, as
lines of one matrix. `tests/helpers/plain_plans.py` says the same in loops, one identity after the other.

G = groups of all identities, K = images of a group; m identities with c images each: one matrix [m, c]
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

UNKNOWN_CAMERA = 1 << 40
"""Above every camera's number."""


@dataclass(frozen=True)
class Images:
    """The images of some identities, which are numbered 0, 1, … here."""

    rows: np.ndarray
    """int64 [n], identity after identity, ascending within each."""
    counts: np.ndarray
    """int64 [identities], how many images each has: at least 1."""

    @classmethod
    def of(cls, labels: np.ndarray, rows: np.ndarray) -> "Images":
        """Those in some rows, ascending, of labels, int64 [all rows]; identities in the order of their labels."""
        own = labels[rows]
        counts = np.bincount(own)
        in_order = bool((own[1:] >= own[:-1]).all())  # as they are packed: nothing to sort
        return cls(rows if in_order else rows[np.argsort(own, kind="stable")], counts[counts > 0])

    @property
    def starts(self) -> np.ndarray:
        """int64 [identities], where the images of each begin in `rows`."""
        return starts_of(self.counts)

    def only(self, chosen: np.ndarray) -> "Images":
        """Of the chosen identities, bool [identities]."""
        return Images(self.rows[np.repeat(chosen, self.counts)], self.counts[chosen])

    def random(self, rng: np.random.Generator) -> np.ndarray:
        """A random number for each of `rows`, float64 [n], drawn in the order of their numbers."""
        drawn = rng.random(len(self.rows))
        if (self.rows[1:] > self.rows[:-1]).all():
            return drawn
        numbers = np.empty_like(drawn)
        numbers[np.argsort(self.rows)] = drawn
        return numbers

    def by_count(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Identities with equally many images: their numbers, int64 [m], and places in `rows`, int64 [m, c]."""
        starts, order = self.starts, np.argsort(self.counts, kind="stable")
        for identities in np.split(order, np.flatnonzero(np.diff(self.counts[order])) + 1):
            yield identities, starts[identities, None] + np.arange(self.counts[identities[0]])


Cut = Callable[[Images, int, np.random.Generator], np.ndarray]
"""cut(images, K, rng) -> rows, int64 [G, K]: an identity with c images gets `num_groups(c, K)` groups, and those of
identity 0 come first."""


def num_groups(num_images: np.ndarray, size: int) -> np.ndarray:
    """Groups of K that an identity's images are cut into; one with fewer than K images fills one group."""
    return np.maximum(num_images // size, 1)


def starts_of(counts: np.ndarray) -> np.ndarray:
    """[2, 3, 1] -> [0, 2, 5]."""
    starts: np.ndarray = counts.cumsum() - counts
    return starts


def draw_until_used(groups: list[int], batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `batch_size` different identities per step among those with groups left, until fewer are left.

    groups: of each identity. Returns the numbers of the identities of each step, int64 [steps, batch_size]. A step is
    the start of a Fisher-Yates shuffle of the identities that are left: every choice and order of them is equally
    likely, at a cost that does not depend on their number. Plain lists, because a step changes what the next may draw.
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
    return np.array(steps, np.int64).reshape(-1, batch_size)


def draw_weighted(weights: np.ndarray, batch_size: int, num_steps: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `batch_size` different identities per step, one after another with probability proportional to weights.

    weights: float [identities], positive. Returns the numbers of the identities of each step, int64 [steps,
    batch_size]. Drawing with replacement and passing over repeats is drawing without replacement; where too few
    different ones came, exponential clocks, which have no memory, tell which of the others come next.
    """
    if not num_steps:
        return np.empty((0, batch_size), np.int64)
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
    return np.array(steps, np.int64)


def identity_groups(images: Images, size: int, rng: np.random.Generator) -> np.ndarray:
    """Shuffle each identity's images and cut them into groups of K; a `Cut`.

    A remainder is dropped; an identity with fewer than K images is sampled with replacement to K.
    """
    order = images.random(rng)
    groups = _Groups(images, size)
    replacements = groups.numbers_for_few(rng)
    for identities, places in images.by_count():
        shuffled = _sorted_by(places, order[places])
        if places.shape[1] < size:
            shuffled = _drawn_again(shuffled, replacements[identities])
        count = shuffled.shape[1] // size
        groups.take(identities, shuffled[:, : count * size].reshape(-1, count, size))
    return groups.rows


def camera_groups(cameras: np.ndarray, images: Images, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut each identity's images into groups of K that hold as many of its cameras as they can; a `Cut`.

    cameras: int64 [all rows]; an unknown camera (-1) is unlike any other. Each image is used at most once. A
    remainder is dropped from the cameras with the most images. The kept images are dealt to the groups in turn, camera
    after camera: a camera with m images then is in min(m, groups) groups, which is the most it can be. An identity
    with fewer than K images gives all of them, and the rest again, with replacement.
    """
    camera = cameras[images.rows]
    camera = np.where(camera >= 0, camera, UNKNOWN_CAMERA + images.rows)
    num_cameras = np.empty_like(images.counts)
    for identities, places in images.by_count():
        num_cameras[identities] = 1 + (np.diff(np.sort(camera[places], axis=1)) > 0).sum(axis=1)
    camera_order, first_camera = rng.random(int(num_cameras.sum())), starts_of(num_cameras)
    order = images.random(rng)
    groups = _Groups(images, size)
    group_order = rng.random(len(groups.rows))
    replacements = groups.numbers_for_few(rng)
    for identities, places in images.by_count():
        places = np.take_along_axis(places, np.lexsort((order[places], camera[places]), axis=1), 1)
        cameras_here = _Cameras(camera[places], camera_order, first_camera[identities])
        count = max(places.shape[1] // size, 1)
        dealt = np.take_along_axis(places, cameras_here.dealt(min(count * size, places.shape[1]), count), 1)
        if places.shape[1] < size:
            dealt = np.hstack([dealt, _drawn_again(dealt, replacements[identities])[:, places.shape[1] :]])
        by_group = dealt.reshape(-1, size, count).transpose(0, 2, 1)  # in turn: 0, 1, …, count - 1, 0, 1, …
        turn = np.argsort(group_order[groups.first[identities, None] + np.arange(count)], axis=1, kind="stable")
        groups.take(identities, np.take_along_axis(by_group, turn[:, :, None], 1))
    return groups.rows


class _Groups:
    """The groups of all identities, which are filled in as they are cut."""

    def __init__(self, images: Images, size: int):
        self.images = images
        counts = num_groups(images.counts, size)
        self.first = starts_of(counts)
        """int64 [identities], number of the first group of each."""
        self.rows = np.empty((int(counts.sum()), size), np.int64)

    def take(self, identities: np.ndarray, places: np.ndarray) -> None:
        """places: int64 [m, count, K] in the images' rows, of m identities."""
        numbers = self.first[identities, None] + np.arange(places.shape[1])
        self.rows[numbers] = self.images.rows[places]

    def numbers_for_few(self, rng: np.random.Generator) -> np.ndarray:
        """K random numbers for each identity with fewer than K images, drawn in their order; float64 [identities, K],
        of which the others' lines are not to be read."""
        few = self.images.counts < self.rows.shape[1]
        numbers = np.empty((len(few), self.rows.shape[1]))
        numbers[few] = rng.random((int(few.sum()), self.rows.shape[1]))
        return numbers


class _Cameras:
    """The cameras of m identities' images, which lie camera after camera. Arrays are [m, c]."""

    def __init__(self, camera: np.ndarray, camera_order: np.ndarray, first_camera: np.ndarray):
        """camera_order: random numbers of the cameras of all identities, `first_camera`, [m], the first of each."""
        self.shape = camera.shape
        begins = np.diff(camera, axis=1, prepend=-1) > 0
        self.number = np.cumsum(begins, axis=1) - 1
        """Of the camera among those of its identity."""
        column = np.broadcast_to(np.arange(self.shape[1]), self.shape)
        self.turn = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
        """How many images of its camera lie before an image."""
        self.order = camera_order[first_camera[:, None] + self.number]
        """Cameras of an identity come in random order."""

    def dealt(self, num_kept: int, count: int) -> np.ndarray:
        """The images that are kept, int64 [m, num_kept], in the order in which they are dealt to `count` groups.

        Kept are one image of each camera, then the second of each, …; cameras with as many as there are groups go
        first, so that the others fill the groups evenly.
        """
        in_turn = np.lexsort((self.order, self.turn), axis=1)
        kept = np.zeros(self.shape, bool)
        np.put_along_axis(kept, in_turn[:, :num_kept], True, axis=1)
        of_camera = np.arange(len(kept))[:, None] * self.shape[1] + self.number
        num_kept_of = np.bincount(of_camera[kept], minlength=kept.size)[of_camera]
        return np.lexsort((self.turn, self.order, num_kept_of < count, ~kept), axis=1)[:, :num_kept]


def _sorted_by(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Each line of a matrix in the order of its keys."""
    return np.take_along_axis(values, np.argsort(keys, axis=1, kind="stable"), 1)


def _drawn_again(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """With replacement: [m, c] by random numbers [m, K] -> [m, K]."""
    return np.take_along_axis(values, (numbers * values.shape[1]).astype(np.int64), 1)
