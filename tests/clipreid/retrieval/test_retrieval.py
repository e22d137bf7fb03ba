"""Retrieval from counts over blocks: against the reference figures, the full matrix, and itself on other ranks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipreid.errors import ModelError
from clipreid.retrieval import distance_blocks, metrics
from clipreid.retrieval.distance_blocks import gallery_rows
from clipreid.retrieval.metrics import retrieve, retrieve_by_distance
from clipreid.retrieval.positives import Labels
from clipreid.retrieval.rules import RULES
from clipreid.retrieval.vehicleid import draw_gallery, vehicleid, vehicleid_draw
from tests.helpers.devices import DEVICES
from tests.helpers.golden_models import read_case
from tests.helpers.rank_threads import run_ranks
from tests.helpers.tolerances import close


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "normalised", "junk"),
    [("normalised", True, False), ("raw", False, False), ("raw_junk_kept", False, True)],
)
def test_measures_match_the_reference_figures(name, normalised, junk, device):
    golden, _ = read_case("retrieval")
    query, gallery = (torch.from_numpy(golden[f"{side}_feat"]) for side in "qg")
    if normalised:
        query, gallery = F.normalize(query), F.normalize(gallery)
    kept = np.full(len(gallery), True) if junk else golden["g_pid"] != -1
    result = retrieve(
        query.to(device),
        Labels(golden["q_pid"], golden["q_cam"]),
        gallery[kept].to(device),
        Labels(golden["g_pid"][kept], golden["g_cam"][kept]),
        rule="camera",
    )
    close(result.mAP, golden[f"{name}__mAP"], atol=1e-6)
    close(result.cmc[[0, 4, 9]], golden[f"{name}__cmc_1_5_10"], atol=1e-6)
    assert result.valid_queries == golden[f"{name}__valid_queries"] and result.queries == 200


def test_vehicleid_draws_match_the_reference_figures():
    golden, _ = read_case("vehicleid")
    features = F.normalize(torch.from_numpy(golden["features"]))
    results = [vehicleid_draw(features, golden["pid"], picks) for picks in golden["gallery_picks"]]
    close([r.mAP for r in results], golden["mAP"], atol=1e-6)
    close([r.cmc[[0, 4, 9]] for r in results], golden["cmc_1_5_10"], atol=1e-6)


def slow_ranks(distances, query, gallery, rule):
    """One query after the other: its valid gallery rows, sorted, and the ranks of its positives."""
    for q in range(len(distances)):
        same = gallery.identities == query.identities[q]
        ignored = same & (rule != "none")
        if rule != "none":
            ignored &= (gallery.cameras == query.cameras[q]) & (query.cameras[q] != -1)
        if rule == "camera_time":
            ignored &= (gallery.times == query.times[q]) & (query.times[q] != "")
        order = np.argsort(distances[q], kind="stable")
        order = order[~ignored[order]]
        yield order, np.flatnonzero(same[order]) + 1


def random_case(queries, gallery, identities, seed, ties=False):
    """Identities 0 … n-1, of which the last have no gallery image; cameras and times with unknown ones."""
    rng = np.random.default_rng(seed)

    def side(n, ids):
        features = rng.integers(-1, 2, (n, 3)) if ties else rng.standard_normal((n, 24))
        times = np.array(["", "noon", "night"])[rng.integers(0, 3, n)]
        labels = Labels(rng.integers(0, ids, n), rng.integers(-1, 3, n), times)
        return torch.from_numpy(features.astype(np.float32)), labels

    return *side(queries, identities), *side(gallery, max(identities - 2, 1))


def exact_distances(query, gallery):
    return torch.cdist(query.double(), gallery.double(), compute_mode="donot_use_mm_for_euclid_dist").numpy()


@pytest.fixture
def ranks_seen(monkeypatch):
    """{query: [ranks of its positives, for each call or rank of a team]}, filled by `retrieve`."""
    seen, measures = {}, metrics._measures

    def watched(ranks):
        row, rank = ranks.ranks()
        for place, query in enumerate(ranks.rows):
            seen.setdefault(int(query), []).append(rank[row == place].tolist())
        return measures(ranks)

    monkeypatch.setattr(metrics, "_measures", watched)
    return seen


def check_ranks(seen, query, query_labels, gallery, gallery_labels, rule, world_size=1):
    """Every positive's rank, as a whole number, of every query, on every rank of the team."""
    slow = slow_ranks(exact_distances(query, gallery), query_labels, gallery_labels, rule)
    expected = {q: [ranks.tolist()] * world_size for q, (_, ranks) in enumerate(slow)}
    assert seen == expected
    seen.clear()


def check_against_slow(result, query, query_labels, gallery, gallery_labels, rule):
    slow = [ranks for _, ranks in slow_ranks(exact_distances(query, gallery), query_labels, gallery_labels, rule)]
    per_query = result.per_query
    assert per_query.positives.tolist() == [len(ranks) for ranks in slow]
    assert per_query.first_rank.tolist() == [ranks[0] if len(ranks) else 0 for ranks in slow]
    valid = [(np.mean(np.arange(1, len(r) + 1) / r), len(r) / r[-1], r[0]) for r in slow if len(r)]
    AP, INP, first = map(np.array, zip(*valid, strict=True))
    assert np.isnan(per_query.AP).tolist() == [not len(ranks) for ranks in slow]
    np.testing.assert_allclose(per_query.AP[per_query.positives > 0], AP, atol=1e-12)
    assert result.mAP == pytest.approx(AP.mean(), abs=1e-12) and result.mINP == pytest.approx(INP.mean(), abs=1e-12)
    np.testing.assert_allclose(result.cmc, [np.mean(first <= r) for r in range(1, 51)], atol=1e-12)
    assert (result.valid_queries, result.queries) == (len(valid), len(slow))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks much smaller than the data."""
    monkeypatch.setattr(distance_blocks, "QUERY_BLOCK", 16)
    monkeypatch.setattr(distance_blocks, "GALLERY_BLOCK", 32)


def moved(case, device):
    """The case with its features on a device."""
    query, query_labels, gallery, gallery_labels = case
    return query.to(device), query_labels, gallery.to(device), gallery_labels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("queries", "gallery", "identities"), [(1, 1, 1), (5, 7, 2), (40, 300, 12), (70, 90, 60)])
def test_counts_over_blocks_equal_sorting_the_full_matrix(
    small_blocks, ranks_seen, rule, queries, gallery, identities, device
):
    """Galleries smaller and larger than a block, queries without a positive."""
    for seed in range(5):
        case = random_case(queries, gallery, identities, seed)
        try:
            result = retrieve(*moved(case, device), rule=rule)
        except ModelError:
            slow = slow_ranks(exact_distances(case[0], case[2]), case[1], case[3], rule)
            assert not any(len(ranks) for _, ranks in slow)
        else:
            check_against_slow(result, *case, rule)
            check_ranks(ranks_seen, *case, rule)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(4))
def test_ties_go_to_the_image_that_comes_first_in_the_gallery(small_blocks, ranks_seen, seed, device):
    """Whole-number features in three dimensions: most distances are tied, some are zero, some negative zero."""
    case = random_case(50, 200, 9, seed, ties=True)
    check_against_slow(retrieve(*moved(case, device), rule="camera"), *case, "camera")
    check_ranks(ranks_seen, *case, "camera")


def test_equal_rows_are_equally_far_wherever_they_lie():
    """Copies of one image all over a gallery of several blocks: the first copy wins, so only its label counts."""
    generator = torch.Generator().manual_seed(0)
    for width in (1280, 512, 130, 17):
        query = torch.randn(600, width, generator=generator)
        gallery = torch.randn(3000, width, generator=generator) + 4
        copy = torch.randn(width, generator=generator) * 0.1
        places = [5, 77, 1023, 1024, 1500, 2047, 2999]
        gallery[places] = copy
        identities = np.zeros(3000, np.int64)
        identities[places[0]] = 1
        result = retrieve(query, Labels(np.full(600, 1)), gallery, Labels(identities), rule="none")
        assert result.cmc[0] == 1.0
        identities[places[0]], identities[places[-1]] = 0, 1
        result = retrieve(query, Labels(np.full(600, 1)), gallery, Labels(identities), rule="none")
        assert result.cmc[5] == 0.0 and result.cmc[6] == 1.0


def on_ranks(world_size, query, query_labels, gallery, gallery_labels, rule="camera", **options):
    """Results of `retrieve` on ranks that have nothing but the gallery rows that are theirs."""

    def one_rank(peers):
        own = np.full_like(gallery, np.nan)
        rows = gallery_rows(gallery_labels, peers)
        own[rows] = gallery[rows]
        return retrieve(query, query_labels, own, gallery_labels, rule=rule, peers=peers, **options)

    return run_ranks(world_size, one_rank)


def assert_same(result, other):
    """Bit by bit."""
    assert result.metrics() == other.metrics() and np.array_equal(result.cmc, other.cmc)
    for part in ("per_query", "nearest"):
        for ours, theirs in zip(
            *(vars(getattr(each, part) or Labels(0)).values() for each in (result, other)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_result_is_bitwise_the_same_on_any_number_of_ranks(world_size):
    """4,000 gallery images in four blocks, near ties everywhere; each rank reads its own rows alone."""
    rng = np.random.default_rng(1)
    query = torch.from_numpy(rng.standard_normal((300, 40)).astype(np.float32))
    gallery = rng.standard_normal((4000, 40)).astype(np.float32)
    gallery[1::2] = gallery[::2] * np.float32(1 + 2e-7)
    labels = (
        Labels(rng.integers(0, 50, 300), rng.integers(0, 3, 300)),
        Labels(rng.integers(0, 50, 4000), rng.integers(0, 3, 4000)),
    )
    alone = retrieve(query, labels[0], gallery, labels[1], rule="camera", top_k=7)
    for result in on_ranks(world_size, query, labels[0], gallery, labels[1], top_k=7):
        assert_same(result, alone)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_share_small_galleries_as_well(small_blocks, ranks_seen, world_size, ties):
    """More ranks than blocks, tied images on different ranks."""
    for seed in range(3):
        for gallery in (3, 40, 150):
            case = random_case(40, gallery, 5, seed, ties)
            for result in on_ranks(world_size, case[0], case[1], case[2].numpy(), case[3]):
                check_against_slow(result, *case, "camera")
            check_ranks(ranks_seen, *case, "camera", world_size)


def test_the_result_does_not_depend_on_the_number_of_threads():
    case = random_case(1100, 3000, 80, seed=3)
    alone = retrieve(*case, rule="camera", top_k=5)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_same(retrieve(*case, rule="camera", top_k=5), alone)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def slow_rates(query, query_labels, gallery, gallery_labels):
    """TPR at each FPR by sorting the distances of all pairs."""
    distances = exact_distances(query, gallery)
    positives, negatives = [], []
    for row, (order, ranks) in zip(
        distances, slow_ranks(distances, query_labels, gallery_labels, "camera"), strict=True
    ):
        own = np.isin(np.arange(len(order)), ranks - 1)
        positives.append(row[order[own]])
        negatives.append(row[order[~own]])
    positives, negatives = np.concatenate(positives), np.sort(np.concatenate(negatives))
    rates = {}
    for name, rate in (("1e-4", 1e-4), ("1e-3", 1e-3), ("1e-2", 1e-2)):
        passing = [d for d in positives if np.searchsorted(negatives, d, side="right") <= rate * len(negatives)]
        rates[name] = len(passing) / len(positives)
    return rates


@pytest.mark.parametrize("misled", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_rates_of_accepted_pairs_equal_sorting_all_pairs(small_blocks, monkeypatch, world_size, misled):
    """Whole numbers, so that distances are exact and some tie. Also where the sample of distances is misleading."""
    if misled:
        monkeypatch.setattr(distance_blocks.DistanceBlocks, "sample_distance", lambda self, rate: torch.tensor(30.0))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        centres = rng.integers(-20, 20, (9, 8))
        _, query_labels, _, gallery_labels = random_case(70, 400, 9, seed)
        query, gallery = (
            torch.from_numpy(
                (centres[side.identities] + rng.integers(-12, 12, (len(side.identities), 8))).astype(np.float32)
            )
            for side in (query_labels, gallery_labels)
        )
        expected = slow_rates(query, query_labels, gallery, gallery_labels)
        assert 0 < expected["1e-4"] < expected["1e-2"] < 1
        for result in on_ranks(world_size, query, query_labels, gallery.numpy(), gallery_labels):
            assert result.tpr_at_fpr == expected


def test_where_no_pair_is_of_two_identities_there_is_no_rate_of_false_ones():
    features, labels = torch.eye(3)[[0, 0]], Labels(np.array([5, 5]))
    result = retrieve(features, labels, features, labels, rule="none")
    assert result.tpr_at_fpr is None and "TPR@FPR" not in result.metrics() and result.mAP == 1.0


UNKNOWN = {"int": (-1,), "text": ("", "-1", " ")}


def with_unknown(case, kind, seed):
    """The case with a third of its images' identities unknown."""
    rng = np.random.default_rng(seed)
    sides = []
    for features, labels in (case[:2], case[2:]):
        identities = labels.identities if kind == "int" else np.array([f"id {i}" for i in labels.identities], "U9")
        places = rng.random(len(identities)) < 1 / 3
        identities[places] = rng.choice(UNKNOWN[kind], places.sum())
        sides += features, Labels(identities, labels.cameras, labels.times), ~places
    return sides


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize("world_size", [1, 3])
def test_an_unknown_identity_equals_none_not_even_another_unknown_one(small_blocks, rule, kind, world_size):
    """A query of unknown identity changes no figure; a gallery image is a wrong one; neither counts for TPR@FPR."""
    for seed in range(3):
        case = random_case(60, 200, 9, seed)
        query, query_labels, query_known, gallery, gallery_labels, gallery_known = with_unknown(case, kind, seed)
        asked = query[query_known], some_of(query_labels, query_known)
        alone = retrieve(*asked, gallery[gallery_known], some_of(gallery_labels, gallery_known), rule=rule)
        wrong = retrieve(*asked, gallery, told_apart(gallery_labels, gallery_known), rule=rule).metrics()
        for found in on_ranks(world_size, query, query_labels, gallery.numpy(), gallery_labels, rule):
            figures = found.metrics()
            assert figures.pop("unknown_identity") == (~query_known).sum() + (~gallery_known).sum()
            assert (figures.pop("queries"), wrong["queries"]) == (60, query_known.sum())
            assert figures == {name: wrong[name] for name in figures} | {"TPR@FPR": alone.tpr_at_fpr}
            assert not found.per_query.positives[~query_known].any()


def some_of(labels, rows):
    return Labels(labels.identities[rows], labels.cameras[rows], labels.times[rows])


def told_apart(labels, known):
    """The labels with an identity of its own for every image of unknown identity."""
    identities = labels.identities.copy() if labels.identities.dtype.kind == "i" else labels.identities.astype("U12")
    numbers = np.arange(1000, 1000 + (~known).sum())
    identities[~known] = numbers if identities.dtype.kind == "i" else [f"other {number}" for number in numbers]
    return Labels(identities, labels.cameras, labels.times)


@pytest.mark.parametrize("identities", [np.array(["", "", "-1"]), np.full(3, -1)])
@pytest.mark.parametrize("side", ["queries", "gallery images"])
def test_nothing_known_is_nothing_to_evaluate(identities, side):
    features = torch.eye(3)
    known = np.array(["a", "b", "c"]) if identities.dtype.kind == "U" else np.arange(3)
    query, gallery = (Labels(ids) for ids in ((identities, known) if side == "queries" else (known, identities)))
    reason = f"nothing to evaluate: none of 3 {side} has a known identity"
    with pytest.raises(ModelError, match=reason):
        retrieve(features, query, features, gallery, rule="none")
    with pytest.raises(ModelError, match=reason):
        retrieve_by_distance(torch.cdist(features, features), query, gallery, rule="none")


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_ranked_lists_are_the_head_of_the_sorted_gallery(small_blocks, world_size, ties):
    """Without what the rule takes out; shorter than k where the gallery is."""
    for gallery, k in ((200, 10), (7, 10)):
        case = random_case(50, gallery, 4, 0, ties)
        exact = exact_distances(case[0], case[2])
        lists = [order for order, _ in slow_ranks(exact, case[1], case[3], "camera")]
        for result in on_ranks(world_size, case[0], case[1], case[2].numpy(), case[3], top_k=k):
            for row, distances, found, order in zip(
                exact, result.nearest.distances, result.nearest.rows, lists, strict=True
            ):
                length = min(k, len(order))
                assert found.tolist() == order[:k].tolist() + [-1] * (k - length)
                close(distances[:length], row[order[:k]], rtol=1e-4, atol=1e-3)
                assert np.isinf(distances[length:]).all()


def test_every_gallery_row_belongs_to_one_rank():
    for size in (0, 1, 1024, 1025, 10_000):
        for world_size in (1, 2, 5):
            gallery = Labels(np.arange(size) % 7)
            rows = run_ranks(world_size, lambda peers, gallery=gallery: gallery_rows(gallery, peers))
            assert sorted(np.concatenate(rows).tolist()) == list(range(size))


def test_a_memory_mapped_gallery_is_read_a_block_at_a_time(tmp_path):
    """Nothing larger than a block of rows is ever asked of the file."""
    query, query_labels, gallery, gallery_labels = random_case(20, 2500, 6, seed=0)
    path = tmp_path / "gallery.npy"
    np.save(path, gallery.numpy())
    asked = []

    class Watched:
        def __init__(self):
            self.rows = np.load(path, mmap_mode="c")

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, rows):
            asked.append(len(self.rows[rows]))
            return self.rows[rows]

    result = retrieve(query, query_labels, Watched(), gallery_labels, rule="camera")
    assert result.metrics() == retrieve(query, query_labels, gallery, gallery_labels, rule="camera").metrics()
    assert max(asked) == 1024


def test_a_given_matrix_is_ranked_like_the_features_it_came_from():
    query, query_labels, gallery, gallery_labels = random_case(30, 80, 6, seed=2)
    distances = torch.cdist(query, gallery)
    by_matrix = retrieve_by_distance(distances, query_labels, gallery_labels, rule="camera")
    by_features = retrieve(query, query_labels, gallery, gallery_labels, rule="camera")
    assert by_matrix.metrics() | {"TPR@FPR": by_features.tpr_at_fpr} == by_features.metrics()


def test_string_identities_and_unknown_cameras():
    """Queries of an unknown camera keep every positive; -1 equals no camera, not even -1."""
    query, gallery = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.1], [1.2]])
    query_labels = Labels(np.array(["a", "b"]), np.array([-1, 0]))
    gallery_labels = Labels(np.array(["a", "b"]), np.array([-1, 0]))
    result = retrieve(query, query_labels, gallery, gallery_labels, rule="camera")
    assert (result.valid_queries, result.queries, result.mAP) == (1, 2, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_is_named(bad):
    query, query_labels, gallery, gallery_labels = random_case(5, 3000, 3, seed=0)
    gallery[2345, 1] = bad
    with pytest.raises(ModelError, match="gallery feature of row 2345"):
        retrieve(query, query_labels, gallery, gallery_labels, rule="camera")


def test_mistakes_are_refused_with_their_remedy():
    features, labels = torch.zeros(2, 3), Labels(np.array([0, 1]), np.array([0, 1]))
    with pytest.raises(ModelError, match="none of 2 queries.*'camera'"):
        retrieve(features, labels, features, labels, rule="camera")
    with pytest.raises(ModelError, match="rule is 'cam'; known: camera, none, camera_time"):
        retrieve(features, labels, features, labels, rule="cam")
    with pytest.raises(ModelError, match="needs times"):
        retrieve(features, labels, features, labels, rule="camera_time")
    with pytest.raises(ModelError, match="no test image is in a list named 800, 1600, 2400"):
        vehicleid(features, labels.identities, np.array(["3200", ""]), draws=10, seed=0)


def test_a_draw_takes_one_image_of_every_identity_and_follows_from_the_seed():
    identities = np.random.default_rng(0).integers(0, 40, 300)
    draws = [draw_gallery(identities, seed=5, draw=t) for t in range(200)]
    for picks in draws:
        assert np.array_equal(identities[picks], np.unique(identities))
    assert np.array_equal(draws[3], draw_gallery(identities, seed=5, draw=3))
    assert not np.array_equal(draws[3], draw_gallery(identities, seed=6, draw=3))
    assert set(np.concatenate(draws).tolist()) == set(range(300))  # every image gets its turn


def test_vehicleid_reports_each_list_over_its_draws():
    golden, _ = read_case("vehicleid")
    features, identities = (
        F.normalize(torch.from_numpy(golden["features"])),
        np.unique(golden["pid"], return_inverse=True)[1],
    )
    lists = np.where(identities < 20, "800,1600", np.where(identities < 40, "1600", "3200"))
    report = vehicleid(features, identities, lists, draws=4, seed=2)
    assert list(report) == ["small", "medium"]
    rows = np.flatnonzero(identities < 20)
    results = [
        vehicleid_draw(features[rows], identities[rows], draw_gallery(identities[rows], 2, t)).metrics()
        for t in range(4)
    ]
    for name in ("R1", "R5", "mAP"):
        values = [result[name] for result in results]
        assert report["small"][name] == {"mean": pytest.approx(np.mean(values)), "std": pytest.approx(np.std(values))}
    assert report["small"]["gallery"] == 20 and report["small"]["queries"] == len(rows) - 20


def test_vehicleid_leaves_images_of_unknown_identity_out_and_counts_them():
    rng = np.random.default_rng(0)
    features, identities = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), rng.integers(0, 8, 40)
    unknown = np.concatenate([identities, np.full(9, -1)])
    more = torch.cat([features, torch.randn(9, 6)])
    expected = vehicleid(features, identities, np.full(40, "800"), draws=3, seed=0)["small"]
    found = vehicleid(more, unknown, np.full(49, "800"), draws=3, seed=0)["small"]
    assert found == expected | {"unknown_identity": 9}
    with pytest.raises(ModelError, match="test list 800: none of its 9 images has a known identity"):
        vehicleid(more[40:], unknown[40:], np.full(9, "800"), draws=2, seed=0)
    with pytest.raises(ModelError, match="test list 800: every identity has one image only.*no query is left"):
        vehicleid(features[:3], np.arange(3), np.full(3, "800"), draws=2, seed=0)


def test_one_draw_has_no_deviation():
    features, identities = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), np.arange(20) % 4
    one = vehicleid(features, identities, np.full(20, "800"), draws=1, seed=0)["small"]
    assert all(set(one[name]) == {"mean"} for name in ("R1", "R5", "mAP"))
