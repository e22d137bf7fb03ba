"""The PK sampler: the published epoch rule, whole identities per rank, equal chances, and its options."""

import hashlib
import random
import time
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from shards.errors import DataError
from shards.loading import pk_sampler
from shards.loading.pk_draws import draw_until_used, draw_weighted
from shards.loading.pk_sampler import PKSettings, check_settings, epoch_plan, rank_part, shards_needed
from tests.helpers.plain_plans import plain_plan


class Split(SimpleNamespace):
    """Stands in for a SplitIndex: what the sampler reads of it."""

    def __len__(self):
        return len(self.labels)


def split_of(images_per_identity, cameras=3, identities_per_shard=4, seed=0):
    """Rows of a few identities, in random order, with random cameras."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(images_per_identity)), images_per_identity))
    camera = rng.integers(0, cameras, len(labels)) if cameras else np.full(len(labels), -1)
    shard = (labels // identities_per_shard).astype(np.int32)
    return Split(
        labels=labels,
        cameras=camera,
        shard=shard,
        shard_names=[f"{n}.tar" for n in range(shard.max() + 1)],
        num_identities=len(images_per_identity),
        name="train",
        index=SimpleNamespace(name="tiny"),
    )


def cases(count, strategies=("identity", "camera_aware", "balanced")):
    """Small random datasets and settings, some with identities of fewer than K images."""
    for seed in range(count):
        rng = random.Random(seed)
        P, K = rng.choice([2, 4, 6, 12]), rng.randint(1, 5)
        identities = [rng.randint(1, 13) for _ in range(P + rng.randint(0, 20))]
        nodes = rng.choice([0, 0, 2]) if len(identities) >= 4 * P else 0
        strategy = strategies[seed % len(strategies)]
        split = split_of(identities, seed=seed)
        yield split, PKSettings(P, K, seed=seed, strategy=strategy, virtual_nodes=nodes), rng.randint(1, 9)


def test_every_batch_holds_P_different_identities_of_K_images():
    for split, settings, epoch in cases(150):
        plan = epoch_plan(split, settings, epoch)
        assert plan.shape[1:] == (settings.identities, settings.images_per_identity)
        labels = split.labels[plan]
        assert (labels == labels[:, :, :1]).all()
        assert all(len(set(batch)) == settings.identities for batch in labels[:, :, 0].tolist())


def test_nothing_is_dropped_but_what_the_rule_drops():
    """Each image at most once where there are K; as many groups as full ones; fewer than P identities left over."""
    for split, settings, epoch in cases(150, ("identity", "camera_aware")):
        P, K = settings.identities, settings.images_per_identity
        settings = replace(settings, virtual_nodes=0)
        plan = epoch_plan(split, settings, epoch)
        images = np.bincount(split.labels)
        allowed = np.maximum(images // K, 1)
        drawn = np.bincount(split.labels[plan[:, :, 0]].reshape(-1), minlength=len(images))
        assert (drawn <= allowed).all()
        assert (drawn < allowed).sum() < P
        used = np.bincount(plan.reshape(-1), minlength=len(split))
        assert used[images[split.labels] >= K].max(initial=0) <= 1


def test_ranks_hold_whole_identities_and_together_the_same_batches_for_every_world_size():
    for split, settings, epoch in cases(60):
        plan = epoch_plan(split, settings, epoch)
        for world_size in [n for n in range(1, settings.identities + 1) if settings.identities % n == 0]:
            parts = [rank_part(plan, rank, world_size) for rank in range(world_size)]
            assert {part.shape[1] for part in parts} == {settings.identities // world_size}
            np.testing.assert_array_equal(np.concatenate(parts, axis=1), plan)


def test_a_plan_depends_on_seed_and_epoch_and_on_nothing_else():
    split = split_of([7] * 40)
    for strategy in ("identity", "camera_aware", "balanced"):
        for nodes in (0, 2):
            settings = PKSettings(8, 4, seed=3, strategy=strategy, virtual_nodes=nodes)
            plan = epoch_plan(split, settings, 2)
            np.random.seed(0)
            np.testing.assert_array_equal(plan, epoch_plan(split, settings, 2))
            for other in (epoch_plan(split, settings, 3), epoch_plan(split, replace(settings, seed=4), 2)):
                assert plan.shape != other.shape or (plan != other).any()


def test_plans_stay_the_same_over_versions():
    """A run that is resumed after an update must see the batches it would have seen."""
    split = split_of([5, 2, 9, 4, 6, 7])
    split.labels = np.sort(split.labels)
    plan = epoch_plan(split, PKSettings(2, 3, seed=11), 4)
    assert len(plan) == 5
    assert plan[0].tolist() == [[6, 5, 5], [21, 23, 20]]
    assert plan[-1].tolist() == [[10, 15, 11], [29, 26, 28]]


RECORDED = {
    "identity": "1cd8aca921701a3344e12afb039212a0",
    "camera_aware": "70874a14d039933a3772c5421fe222c4",
    "balanced": "a587d9aec7f12facebe4feaed953a3e1",
}


@pytest.mark.parametrize("strategy", RECORDED)
def test_plans_of_many_datasets_stay_the_same_over_versions(strategy):
    """Of 400 random cases, some with virtual nodes and unknown cameras; recorded from the vectorised sampler."""
    digest = hashlib.sha256()
    for split, settings, epoch in cases(400, (strategy,)):
        split.cameras[::5] = -1
        plan = epoch_plan(split, settings, epoch)
        digest.update(repr((plan.shape, str(plan.dtype))).encode() + plan.tobytes())
    assert digest.hexdigest()[:32] == RECORDED[strategy]


@pytest.mark.parametrize("strategy", RECORDED)
@pytest.mark.parametrize("packed", [True, False], ids=["as packed", "in any order"])
def test_plans_are_bit_for_bit_those_of_plain_loops(strategy, packed, monkeypatch):
    """Of random cases, some with virtual nodes, labels that do not occur, unknown cameras, one very large identity."""
    for seed, (split, settings, epoch) in enumerate(cases(150, (strategy,))):
        split.cameras[seed % 3 :: 5] = -1
        if seed % 4 == 0:
            split.labels = np.where(split.labels % 3 == 1, 0, split.labels)
            split.num_identities = len(np.unique(split.labels))
            settings = replace(settings, identities=min(2, split.num_identities), virtual_nodes=0)
        if packed:
            split.labels, split.shard = np.sort(split.labels), np.sort(split.shard)
        plan = epoch_plan(split, settings, epoch)
        with monkeypatch.context() as patch:
            patch.setattr(pk_sampler, "_plan", plain_plan)
            expected = epoch_plan(split, settings, epoch)
        assert (plan.dtype, plan.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(plan, expected)


def naive_epoch(images, P, K, rng):
    """The released code's loop, in the plainest form: the identities of each batch, and each identity's images."""
    groups = {}
    for label, count in enumerate(images):
        rows = list(range(count)) if count >= K else rng.choices(range(count), k=K)
        rng.shuffle(rows)
        groups[label] = [rows[i : i + K] for i in range(0, len(rows) - K + 1, K)]
    left, batches = list(groups), []
    while len(left) >= P:
        batch = rng.sample(left, P)
        batches.append([(label, groups[label].pop(0)) for label in batch])
        left = [label for label in left if groups[label]]
    return batches


def test_draws_follow_the_distribution_of_the_published_loop():
    """How long epochs are, and which pairs meet in the second batch, over many epochs of both."""
    images, P, K, epochs = [9, 2, 4, 8, 3], 2, 2, 6000
    split, rng = split_of(images), random.Random(0)
    ours, naive = Counter(), Counter()
    for epoch in range(1, epochs + 1):
        labels = split.labels[epoch_plan(split, PKSettings(P, K), epoch)[:, :, 0]]
        ours.update([len(labels), tuple(labels[1].tolist())])
        batches = naive_epoch(images, P, K, rng)
        naive.update([len(batches), tuple(label for label, _ in batches[1])])
    for outcome in ours | naive:
        expected = naive[outcome] / epochs
        assert abs(ours[outcome] / epochs - expected) < 5 * (2 * expected * (1 - expected) / epochs) ** 0.5 + 1e-3


@pytest.mark.parametrize("strategy", ["identity", "balanced"])
@pytest.mark.parametrize("nodes", [0, 2])
def test_images_of_one_identity_have_equal_chances_over_epochs(strategy, nodes):
    split = split_of([7, 3, 2, 9, 5, 4, 11, 6, 7, 8, 3, 5], identities_per_shard=3)
    used, epochs = np.zeros(len(split)), 1500
    for epoch in range(1, epochs + 1):
        used += np.bincount(
            epoch_plan(split, PKSettings(4, 4, strategy=strategy, virtual_nodes=nodes), epoch).reshape(-1),
            minlength=len(split),
        )
    for label in range(12):
        counts = used[split.labels == label]
        assert np.abs(counts - counts.mean()).max() < 6 * counts.mean() ** 0.5


def test_camera_aware_groups_hold_as_many_cameras_as_they_can():
    """Where each camera has enough images: min(K, cameras) in every group. Always: the largest possible sum."""
    for seed in range(60):
        rng = random.Random(seed)
        K, split = rng.randint(2, 5), split_of([rng.randint(1, 17) for _ in range(8)], rng.randint(1, 6), seed=seed)
        plan = epoch_plan(split, PKSettings(1, K, seed=seed, strategy="camera_aware"), 1)[:, 0]
        groups = defaultdict(list)
        for group in plan:
            groups[split.labels[group[0]]].append(len(set(split.cameras[group].tolist())))
        for label, found in groups.items():
            images = Counter(split.cameras[split.labels == label].tolist())
            n = len(found)
            keep = n * K
            most = sum(min(count, n) for count in images.values())
            assert sum(found) == min(most, keep)
            assert max(found) - min(found) <= 1
            if all(count >= n for count in images.values()):
                assert set(found) == {min(K, len(images))}


def test_camera_aware_takes_an_unknown_camera_for_one_unlike_any_other():
    split = split_of([8, 8])
    split.cameras = np.where(split.labels == 0, -1, 0)
    plan = epoch_plan(split, PKSettings(2, 4, strategy="camera_aware"), 1)
    assert sorted(plan.reshape(-1).tolist()) == list(range(16))


def test_camera_aware_gives_images_of_a_camera_equal_chances():
    split = split_of([9, 11, 7, 3], cameras=2)
    used = np.zeros(len(split))
    for epoch in range(1, 1501):
        plan = epoch_plan(split, PKSettings(2, 4, strategy="camera_aware"), epoch)
        used += np.bincount(plan.reshape(-1), minlength=len(split))
    for label in range(4):
        for camera in range(2):
            counts = used[(split.labels == label) & (split.cameras == camera)]
            assert np.abs(counts - counts.mean()).max() < 6 * counts.mean() ** 0.5


def test_balanced_draws_identities_by_their_images_to_the_power_alpha():
    images = np.array([4, 16, 36, 64, 100, 4, 16, 36, 64, 100] * 4)
    split = split_of(images.tolist())
    for alpha in (0.0, 0.5, 1.0):
        settings = PKSettings(2, 2, strategy="balanced", balance_alpha=alpha)
        drawn = np.zeros(len(images))
        for epoch in range(1, 31):
            plan = epoch_plan(split, settings, epoch)
            assert len(plan) == (images // 2).sum() // 2
            drawn += np.bincount(split.labels[plan[:, :, 0]].reshape(-1), minlength=len(images))
        share = drawn.reshape(-1, 5).sum(0) / drawn.sum()
        expected = images[:5] ** alpha / (images[:5] ** alpha).sum()
        np.testing.assert_allclose(share, expected, atol=0.01)


def test_balanced_uses_all_images_of_an_identity_before_one_comes_again():
    split = split_of([8, 80, 8])
    plan = epoch_plan(split, PKSettings(2, 4, strategy="balanced", balance_alpha=0.0), 1)
    groups = plan[split.labels[plan[:, :, 0]] == 0]
    assert len(groups) > 4
    for first, second in zip(groups[0::2], groups[1::2], strict=False):
        assert len({*first.tolist(), *second.tolist()}) == 8


def test_weighted_draws_without_replacement_match_drawing_one_after_another():
    """Extreme weights, so that the vectorised first round often finds too few different identities."""
    weights, steps = np.array([100.0, 10.0, 1.0, 1.0]), 20000
    drawn = draw_weighted(weights, 3, steps, np.random.default_rng(0))
    expected = Counter()
    for a in range(4):
        for b in {0, 1, 2, 3} - {a}:
            for c in {0, 1, 2, 3} - {a, b}:
                rest = weights.sum() - weights[a]
                expected[a, b, c] = weights[a] / weights.sum() * weights[b] / rest * weights[c] / (rest - weights[b])
    found = Counter(map(tuple, drawn))
    for outcome, chance in expected.items():
        assert abs(found[outcome] / steps - chance) < 5 * (chance / steps) ** 0.5


def test_draws_end_when_fewer_identities_than_a_batch_are_left():
    drawn = draw_until_used([5, 1, 1], 2, np.random.default_rng(0))
    assert sorted(Counter(identity for step in drawn for identity in step).values()) in ([1, 1], [1, 1, 2])
    assert [len(step) for step in draw_until_used([3, 3], 2, np.random.default_rng(0))] == [2, 2, 2]


def test_with_locality_a_virtual_node_reads_its_own_shards_only_and_they_change_with_the_epoch():
    split = split_of([6] * 96, identities_per_shard=4)
    settings = PKSettings(16, 4, seed=1, virtual_nodes=8)
    dealt = []
    for epoch in range(1, 5):
        plan = epoch_plan(split, settings, epoch)
        per_node = [set(shards_needed(split, rank_part(plan, node, 8))) for node in range(8)]
        assert sum(map(len, per_node)) == len(set().union(*per_node)) == 24
        half = set(shards_needed(split, rank_part(plan, 1, 2)))
        assert half == set().union(*per_node[4:])
        dealt.append(per_node)
    assert all(dealt[0] != other for other in dealt[1:])


def test_shards_are_listed_in_the_order_of_need():
    split = split_of([4] * 12, identities_per_shard=1)
    plan = epoch_plan(split, PKSettings(3, 4), 1)
    assert shards_needed(split, plan) == split.labels[plan[:, :, 0]].reshape(-1).tolist()
    assert shards_needed(split, plan[2:]) == split.labels[plan[2:, :, 0]].reshape(-1).tolist()


@pytest.mark.parametrize(
    ("settings", "world_size", "words"),
    [
        (PKSettings(9, 4), 1, ["stage2.identities: 9", "has 8", "at most 8"]),
        (PKSettings(8, 4), 3, ["8 identities", "3 workers", "multiple of 3", "1 or 2 or 4 or 8"]),
        (PKSettings(8, 4, virtual_nodes=3), 1, ["8 identities", "3 virtual nodes", "data.virtual_nodes"]),
        (PKSettings(8, 4, virtual_nodes=4), 1, ["data.virtual_nodes: 4", "2 training shards", "--shard-mb"]),
        (PKSettings(8, 4, strategy="camera_aware"), 1, ["camera_aware", "no cameras", "identity"]),
        (PKSettings(8, 4, strategy="random"), 1, ["'random'", "identity, camera_aware, balanced"]),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_remedy(settings, world_size, words):
    split = split_of([5] * 8, cameras=0)
    with pytest.raises(DataError) as error:
        check_settings(split, settings, world_size)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_virtual_node_without_enough_identities_is_named():
    split = split_of([5] * 9, identities_per_shard=8)
    with pytest.raises(DataError, match=r"virtual_nodes.* got 1 identities.* 4 to every batch"):
        epoch_plan(split, PKSettings(8, 4, virtual_nodes=2), 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"strategy": "camera_aware"}, {"strategy": "balanced"}, {"virtual_nodes": 8}],
)
def test_an_epoch_of_vehicleid_is_planned_in_less_than_a_second(options):
    rng = np.random.default_rng(0)
    spread = rng.gamma(2.0, size=13164)
    images = 1 + rng.multinomial(113346 - 13164, spread / spread.sum())
    split = split_of(images.tolist(), cameras=20, identities_per_shard=400)
    taken = []
    for epoch in range(1, 6):
        start = time.process_time()  # not the wall clock: other tests may run beside this one
        plan = epoch_plan(split, PKSettings(16, 4, **options), epoch)
        taken.append(time.process_time() - start)
    assert len(plan) > 1200
    assert min(taken) < 1


@pytest.mark.parametrize("strategy", ["identity", "camera_aware", "balanced"])
def test_planning_holds_a_few_numbers_an_image(strategy):
    """In arrays; as Python objects they take 220 to 300 bytes an image, and processes of a node plan side by side."""
    images = np.random.default_rng(0).integers(1, 40, 10_000)
    split = split_of(images.tolist(), cameras=20, identities_per_shard=400)
    tracemalloc.start()
    try:
        plan = epoch_plan(split, PKSettings(16, 4, strategy=strategy), 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.size > 0.8 * len(split)
    assert peak < 150 * len(split), peak / len(split)


def test_the_benchmark_plans_what_the_plain_loop_plans(monkeypatch):
    from launch.benchmarks import sampler as benchmark

    split = split_of([5, 2, 9, 4, 6, 7] * 5)
    epoch = benchmark.plain_epoch(split.labels, 4, 3, seed=0)
    plan = epoch_plan(split, PKSettings(4, 3), 1)
    assert len(epoch) % 12 == 0
    assert abs(len(epoch) // 12 - len(plan)) <= 2
    monkeypatch.setitem(benchmark.SIZES, "million", benchmark.Size(3000, 3000, 100, 100, rounds=1, plain=False))
    monkeypatch.setattr(benchmark, "PIECE_IMAGES", 1000)
    result = benchmark.run(["--size", "million"])
    assert (result["index_images"], result["train_identities"], result["plain_loop_s"]) == (3000, 100, None)
    peaks = [result["open_index_peak_memory_mb"], *result["plan_epoch_peak_memory_mb"].values()]
    assert min(*result["open_index_s"].values(), *peaks) > 0
    result = benchmark.run(["--rounds", "1"])
    assert (result["index_images"], result["train_images"], result["train_identities"]) == (221_763, 113_346, 13_164)
    assert min(*result["open_index_s"].values(), *result["plan_epoch_s"].values(), result["plain_loop_s"]) > 0


def test_training_images_without_a_label_are_no_identity():
    split = split_of([4, 4, 4])
    split.labels[:3] = -1
    with pytest.raises(DataError, match="tiny: 3 images of split train have no label: pack it again"):
        epoch_plan(split, PKSettings(identities=2, images_per_identity=2), 1)
