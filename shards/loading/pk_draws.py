"""Random choices of the sampler: identities for batches, and images cut into groups of K.

    index -> sampler [draws] -> loader

Vectorised, and pure functions of their generator. Only `Generator.random` is drawn from: numpy may change what its
other methods make of the same bits, and a resumed run would then see other batches. Lines "sorted by identity"
list the images of identity 0 first; identities are numbered without gaps.
"""

from collections.abc import Callable

import numpy as np

Cut = Callable[[np.ndarray, np.ndarray, int, np.random.Generator], np.ndarray]
"""cut(positions [n], number [n], K, rng) -> int64 [groups, K], numbers into the n images, sorted by identity;
an identity with c images gets max(c // K, 1) groups. `number` is each image's identity, numbered without gaps,
`positions` its place in the caller's columns."""


def draw_until_used(groups: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `batch` different identities per step among those with groups left, until fewer are left.

    groups: int [identities]. Returns int64 [steps, batch]. A step is the start of a Fisher-Yates shuffle of the
    identities that are left: every choice and order of `batch` of them is equally likely, at a cost that does not
    depend on their number. Plain lists, because a step changes what the next one may draw.
    """
    left, remaining = list(range(len(groups))), groups.tolist()
    steps = []
    for numbers in rng.random((int(groups.sum()) // batch, batch)).tolist():
        num_left = len(left)
        if num_left < batch:
            break
        for place, number in enumerate(numbers):
            chosen = place + int(number * (num_left - place))
            left[place], left[chosen] = left[chosen], left[place]
        steps.append(left[:batch])
        for place in range(batch - 1, -1, -1):
            identity = left[place]
            remaining[identity] -= 1
            if not remaining[identity]:
                left[place] = left[-1]
                left.pop()
    return np.array(steps, np.int64).reshape(-1, batch)


def draw_weighted(weights: np.ndarray, batch: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `batch` different identities per step, one after another with probability proportional to weights.

    weights: float [identities], positive. Returns int64 [steps, batch]. Drawing with replacement and passing over
    repeats is drawing without replacement; where too few different ones came, exponential clocks, which have no
    memory, tell which of the others come next.
    """
    if not steps:
        return np.empty((0, batch), np.int64)
    ends = np.cumsum(weights)
    tries = np.searchsorted(ends / ends[-1], rng.random((steps, 2 * batch)), side="right")
    new = occurrence((tries + np.arange(steps)[:, None] * len(weights)).reshape(-1)).reshape(tries.shape) == 0
    rank = np.cumsum(new, axis=1) - 1
    drawn = np.full((steps, batch), -1)
    step, place = np.nonzero(new & (rank < batch))
    drawn[step, rank[step, place]] = tries[step, place]
    for step in np.flatnonzero(drawn[:, -1] < 0):
        have = rank[step, -1] + 1
        clocks = -np.log1p(-rng.random(len(weights))) / weights
        clocks[drawn[step, :have]] = np.inf
        drawn[step, have:] = np.argsort(clocks, kind="stable")[: batch - have]
    return drawn


def identity_groups(_, number: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Shuffle each identity's images and cut them into groups of K; a `Cut`.

    A remainder is dropped; an identity with fewer than K images is sampled with replacement to K.
    """
    order = np.lexsort((rng.random(len(number)), number))
    images = np.bincount(number)
    few = images < size
    with_replacement = (rng.random((int(few.sum()), size)) * images[few, None]).astype(np.int64)
    return _cut(order, images, size, with_replacement)


def camera_groups(
    cameras: np.ndarray, positions: np.ndarray, number: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Cut each identity's images into groups of K that hold as many of its cameras as they can; a `Cut`.

    cameras: int64, the caller's column; an unknown camera (-1) is unlike any other. Each image is used at most
    once. A remainder is dropped from the cameras with the most images. The kept images are dealt to the groups in
    turn, camera after camera: a camera with m images then is in min(m, groups) groups, which is the most it can
    be. Cameras with as many images as there are groups go first, so that the others fill the groups evenly. An
    identity with fewer than K images gives all of them, and the rest again, with replacement.
    """
    images = np.bincount(number)
    groups = np.maximum(images // size, 1)
    kept = np.where(images < size, images, groups * size)
    pair = _camera_of_identity(cameras[positions], number)
    pair_order = rng.random(int(pair.max()) + 1)[pair]  # cameras of an identity come in random order
    shuffled = np.lexsort((rng.random(len(pair)), pair))
    turn = np.empty(len(pair), np.int64)  # number of the image among those of its identity and camera
    turn[shuffled] = occurrence(pair[shuffled])

    dealt = np.lexsort((pair_order, turn, number))  # one image of each camera, then the second of each, ...
    dealt = dealt[occurrence(number[dealt]) < kept[number[dealt]]]
    in_all = np.bincount(pair[dealt], minlength=len(pair))[pair] >= groups[number]
    dealt = dealt[np.lexsort((turn[dealt], pair_order[dealt], ~in_all[dealt], number[dealt]))]
    group = occurrence(number[dealt]) % groups[number[dealt]]
    first = np.cumsum(groups) - groups
    group_order = rng.random(int(groups.sum()))[first[number[dealt]] + group]
    order = dealt[np.lexsort((group, group_order, number[dealt]))]

    few = images < size
    again = (rng.random((int(few.sum()), size)) * images[few, None]).astype(np.int64)
    once = np.arange(size)
    return _cut(order, kept, size, np.where(once < images[few, None], once, again))


def occurrence(values: np.ndarray) -> np.ndarray:
    """How often each value came before: [a, b, a, a] -> [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-1))
    result = np.empty(len(values), np.int64)
    result[order] = np.arange(len(values)) - np.repeat(starts, np.diff(starts, append=len(values)))
    return result


def _camera_of_identity(camera: np.ndarray, number: np.ndarray) -> np.ndarray:
    """A number without gaps for each identity and camera that occur together."""
    known = int(camera.max()) + 1
    camera = np.where(camera >= 0, camera, known + np.arange(len(camera)))
    return np.unique(number * (known + len(camera)) + camera, return_inverse=True)[1]


def _cut(order: np.ndarray, images: np.ndarray, size: int, few_places: np.ndarray) -> np.ndarray:
    """Groups of neighbours in `order`, which lists images[i] images of each identity i.

    few_places: int64 [identities with fewer than K images, K], which of its images such an identity gives.
    """
    groups = np.maximum(images // size, 1)
    first, start = np.cumsum(groups) - groups, np.cumsum(images) - images
    places = np.arange(size) + size * (np.arange(groups.sum()) - np.repeat(first, groups))[:, None]
    places[first[images < size]] = few_places
    return order[np.repeat(start, groups)[:, None] + places]
