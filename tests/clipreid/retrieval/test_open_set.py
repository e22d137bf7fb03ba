"""Open-set figures equal those of a plain double loop, and do not depend on ranks or on how features are held."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from clipreid.errors import ModelError
from clipreid.retrieval.distance_blocks import DistanceBlocks
from clipreid.retrieval.open_set import GALLERY_PARTS, RATES, open_set
from clipreid.retrieval.pair_counts import STEPS, count_pairs
from clipreid.retrieval.positives import Labels


def made(seed=0, identities=60, width=6, spread=0.5):
    """Queries and gallery of identities, some of which are in one of them alone or unknown, cameras, float64."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(identities + 4, width))

    def side(each, own):
        names = np.repeat([*range(identities), *own, -1], each)
        features = centres[names] + spread * draw.normal(size=(len(names), width))
        order = draw.permutation(len(names))
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        return unit[order].astype(np.float32), Labels(names[order], draw.integers(-1, 3, len(names)))

    return side(4, [identities]), side(6, [identities + 1, identities + 2])


def plain_searches(query, gallery, rule, strangers, absent):
    """(distance of the nearest, is it right) of mated searches, and the distances of non-mated ones."""
    (q_features, q), (g_features, g) = query, gallery
    mated, non_mated = [], []
    for a, feature in enumerate(q_features.astype(np.float64)):
        left = []
        for b, other in enumerate(g_features.astype(np.float64)):
            same = q.identities[a] == g.identities[b]
            ignored = rule == "camera" and same and q.cameras[a] == g.cameras[b] != -1
            if g.identities[b] != -1 and g.identities[b] not in absent and not ignored:
                left.append((math.dist(feature, other), same))
        if q.identities[a] == -1:
            continue
        if any(same for _, same in left):
            mated.append(min(left))
        elif q.identities[a] in strangers or q.identities[a] not in g.identities:
            non_mated.append(min(left)[0])
    return mated, non_mated


def plain_rates(mated, non_mated, rate):
    """FPIR and FNIR by trying every distance as the threshold."""
    best = 0.0
    for threshold in sorted(non_mated):
        if sum(distance < threshold for distance in non_mated) <= rate * len(non_mated):
            best = threshold
    missed = sum(not (same and distance < best) for distance, same in mated)
    return sum(distance < best for distance in non_mated) / len(non_mated), missed / len(mated)


@pytest.mark.parametrize("rule", ["camera", "none"])
def test_figures_equal_a_plain_double_loop_in_every_gallery(rule):
    query, gallery = made()
    tensors = torch.from_numpy(query[0]), query[1], torch.from_numpy(gallery[0]), gallery[1]
    found = open_set(*tensors, rule=rule, rate=0.05, seed=3)
    shared = sorted(set(query[1].identities) & set(gallery[1].identities) - {-1})
    drawn = np.random.default_rng(3).permutation(shared).tolist()
    out, left = drawn[:30], drawn[30:]
    assert len(found.by_gallery) == len(GALLERY_PARTS) == 4
    for part, searches in zip(GALLERY_PARTS, found.by_gallery, strict=True):
        absent = set(out) | set(left[math.ceil(len(left) / part) :])
        mated, non_mated = plain_searches(query, gallery, rule, set(out), absent)
        assert len(searches.mated) == len(mated) and len(searches.non_mated) == len(non_mated)
        np.testing.assert_allclose(sorted(searches.non_mated), sorted(non_mated), rtol=1e-5)
        for rate in RATES:
            threshold = searches.threshold(rate)
            got = threshold.rate.value, searches.fnir(threshold).value
            assert got == pytest.approx(plain_rates(mated, non_mated, rate), abs=1e-12)
    assert 0.05 < found.by_gallery[-1].fnir(found.by_gallery[-1].threshold(0.1)).value < 0.95


@pytest.mark.parametrize("rule", ["camera", "none"])
def test_pairs_are_those_of_a_plain_double_loop(rule):
    (q_features, q), (g_features, g) = made(1, identities=12)
    half = np.arange(0, 12, 2)
    blocks = DistanceBlocks(torch.from_numpy(q_features), q, torch.from_numpy(g_features), g, rule)
    found = count_pairs(blocks, half)
    assert found.cameras.tolist() == [-1, 0, 1, 2]
    plain = defaultdict(list)
    for a, feature in enumerate(q_features.astype(np.float64)):
        for b, other in enumerate(g_features.astype(np.float64)):
            ours, theirs = q.identities[a], g.identities[b]
            ignored = rule == "camera" and ours == theirs and q.cameras[a] == g.cameras[b] != -1
            if -1 not in (ours, theirs) and (ours in half) == (theirs in half) and not ignored:
                plain[int(q.cameras[a]) + 1, int(ours in half), int(ours == theirs)].append(math.dist(feature, other))
    step = found.distances[1] - found.distances[0]
    assert len(found.distances) == STEPS and found.counts.sum() == sum(map(len, plain.values()))
    for place, distances in plain.items():
        counted = np.repeat(found.distances, found.counts[place])
        assert len(counted) == len(distances)
        np.testing.assert_allclose(counted, sorted(distances), atol=1.01 * step)


class Ranks:
    """One of several ranks after another: what each would add is kept, and summed when all have been there."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def all_reduce_sum(self, tensor):
        return tensor


def test_the_pairs_of_ranks_add_up_to_those_of_one():
    (q_features, q), (g_features, g) = made(2, identities=400)
    sets = torch.from_numpy(q_features), q, g_features, g
    half = np.arange(0, 400, 3)
    whole = count_pairs(DistanceBlocks(*sets, "camera"), half)
    parts = [count_pairs(DistanceBlocks(*sets, "camera", Ranks(rank, 2)), half).counts for rank in range(2)]
    assert all(part.sum() for part in parts) and (sum(parts) == whole.counts).all()


def test_an_array_and_a_tensor_and_the_same_seed_give_the_same():
    query, gallery = made()
    first, again, other = (
        open_set(torch.from_numpy(query[0]), query[1], features, gallery[1], rule="camera", rate=0.1, seed=seed)
        for features, seed in ((gallery[0], 0), (torch.from_numpy(gallery[0]), 0), (gallery[0], 1))
    )
    assert first.metrics() == again.metrics() != other.metrics()


def test_the_decision_names_threshold_probability_and_cameras_with_enough_identities():
    query, gallery = made(identities=120)
    metrics = open_set(
        torch.from_numpy(query[0]), query[1], gallery[0], gallery[1], rule="none", rate=0.1, seed=0
    ).metrics()
    threshold, same = metrics["threshold"], metrics["same_identity"]
    assert threshold["wanted"] == 0.1 and threshold["FPIR"]["value"] <= 0.1 <= threshold["FPIR"]["high"]
    assert threshold["FNIR"] == metrics["FNIR@FPIR"]["0.1"] and threshold["distance"]["low"] < 2
    assert same["slope"] < 0 and same["calibration_error"] < 0.1
    assert list(same["by_camera"]) == ["0", "1", "2"]
    few = made(identities=30)
    found = open_set(torch.from_numpy(few[0][0]), few[0][1], few[1][0], few[1][1], rule="none", rate=0.1, seed=0)
    assert found.by_camera == {}


def test_too_few_identities_are_refused():
    labels = Labels(np.array([1, 1]))
    with pytest.raises(ModelError, match="takes half of the identities out of the gallery, and 1 are in"):
        open_set(torch.ones(2, 3), labels, torch.ones(2, 3), labels, rule="none", rate=0.1, seed=0)
