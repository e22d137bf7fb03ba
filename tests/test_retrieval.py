"""Retrieval from counts over blocks: against the reference figures, the full matrix, and itself on other ranks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_models import read_case
from rank_threads import run_ranks

from clipreid import retrieval
from clipreid.errors import ModelError
from clipreid.protocols import draw_gallery, vehicleid, vehicleid_draw
from clipreid.retrieval import Labels, gallery_rows, retrieve, retrieve_by_distance


@pytest.mark.parametrize(
    ("name", "normalised", "junk"),
    [("normalised", True, False), ("raw", False, False), ("raw_junk_kept", False, True)],
)
def test_measures_match_the_reference_figures(name, normalised, junk):
    golden, _ = read_case("retrieval")
    query, gallery = (torch.from_numpy(golden[f"{side}_feat"]) for side in "qg")
    if normalised:
        query, gallery = F.normalize(query), F.normalize(gallery)
    kept = np.full(len(gallery), True) if junk else golden["g_pid"] != -1
    result = retrieve(
        query,
        Labels(golden["q_pid"], golden["q_cam"]),
        gallery[kept],
        Labels(golden["g_pid"][kept], golden["g_cam"][kept]),
    )
    assert abs(result.mAP - golden[f"{name}__mAP"]) < 1e-6
    np.testing.assert_allclose(result.cmc[[0, 4, 9]], golden[f"{name}__cmc_1_5_10"], atol=1e-6)
    assert result.valid_queries == golden[f"{name}__valid_queries"] and result.queries == 200


def test_vehicleid_draws_match_the_reference_figures():
    golden, _ = read_case("vehicleid")
    features = F.normalize(torch.from_numpy(golden["features"]))
    results = [vehicleid_draw(features, golden["pid"], picks) for picks in golden["gallery_picks"]]
    np.testing.assert_allclose([r.mAP for r in results], golden["mAP"], atol=1e-6)
    np.testing.assert_allclose([r.cmc[[0, 4, 9]] for r in results], golden["cmc_1_5_10"], atol=1e-6)


def slow_measures(distances, query, gallery, rule):
    """One query after the other: sort the valid gallery, walk down the list. AP, INP and first rank, as sums."""
    totals, first_ranks = np.zeros(2), []
    for q in range(len(distances)):
        same = gallery.identities == query.identities[q]
        ignored = same & (rule != "none")
        if rule != "none":
            ignored &= (gallery.cameras == query.cameras[q]) & (query.cameras[q] != -1)
        if rule == "camera_time":
            ignored &= (gallery.times == query.times[q]) & (query.times[q] != "")
        order = np.argsort(distances[q], kind="stable")
        hits = same[order[~ignored[order]]]
        ranks = np.flatnonzero(hits) + 1
        if len(ranks):
            totals += np.mean(np.arange(1, len(ranks) + 1) / ranks), len(ranks) / ranks[-1]
            first_ranks.append(ranks[0])
    cmc = [np.mean(np.array(first_ranks) <= r) for r in range(1, 51)]
    return totals[0] / len(first_ranks), totals[1] / len(first_ranks), cmc, len(first_ranks)


def random_case(queries, gallery, identities, seed, ties=False):
    """Identities 0 … n-1, of which the last have no gallery image; cameras and times with unknown ones."""
    rng = np.random.default_rng(seed)

    def side(n, ids):
        features = rng.integers(-1, 2, (n, 3)) if ties else rng.standard_normal((n, 24))
        times = np.array(["", "noon", "night"])[rng.integers(0, 3, n)]
        labels = Labels(rng.integers(0, ids, n), rng.integers(-1, 3, n), times)
        return torch.from_numpy(features.astype(np.float32)), labels

    return *side(queries, identities), *side(gallery, max(identities - 2, 1))


def check_against_slow(result, query, query_labels, gallery, gallery_labels, rule):
    exact = torch.cdist(query.double(), gallery.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    mean_ap, mean_inp, cmc, valid = slow_measures(exact.numpy(), query_labels, gallery_labels, rule)
    assert result.mAP == pytest.approx(mean_ap, abs=1e-12) and result.mINP == pytest.approx(mean_inp, abs=1e-12)
    np.testing.assert_allclose(result.cmc, cmc, atol=1e-12)
    assert result.valid_queries == valid


@pytest.mark.parametrize("rule", retrieval.RULES)
@pytest.mark.parametrize(("queries", "gallery", "identities"), [(1, 1, 1), (5, 7, 2), (40, 300, 12), (70, 90, 60)])
def test_counts_over_blocks_equal_sorting_the_full_matrix(monkeypatch, rule, queries, gallery, identities):
    """Blocks much smaller than the data, galleries smaller than a block, queries without a positive."""
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", 16)
    monkeypatch.setattr(retrieval, "GALLERY_BLOCK", 32)
    for seed in range(5):
        case = random_case(queries, gallery, identities, seed)
        exact = torch.cdist(case[0], case[2]).numpy()
        try:
            result = retrieve(*case, rule=rule)
        except ModelError:
            with np.errstate(invalid="ignore", divide="ignore"), pytest.warns(RuntimeWarning):
                assert slow_measures(exact, case[1], case[3], rule)[3] == 0
        else:
            check_against_slow(result, *case, rule)


@pytest.mark.parametrize("seed", range(4))
def test_ties_go_to_the_image_that_comes_first_in_the_gallery(monkeypatch, seed):
    """Whole-number features in three dimensions: most distances are tied, some are zero, some negative zero."""
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", 16)
    monkeypatch.setattr(retrieval, "GALLERY_BLOCK", 32)
    case = random_case(50, 200, 9, seed, ties=True)
    check_against_slow(retrieve(*case, rule="camera"), *case, "camera")


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
    alone = retrieve(query, labels[0], gallery, labels[1])

    def one_rank(rank, gather):
        own = np.full_like(gallery, np.nan)
        rows = gallery_rows(4000, rank, world_size)
        own[rows] = gallery[rows]
        return retrieve(
            query, labels[0], own, labels[1], part=(rank, world_size),
            reduce_sum=lambda x: gather(x[None]).sum(0).to(x.dtype),
        )  # fmt: skip

    for result in run_ranks(world_size, one_rank):
        assert result.metrics() == alone.metrics() and np.array_equal(result.cmc, alone.cmc)


def test_every_gallery_row_belongs_to_one_rank():
    for size in (0, 1, 1024, 1025, 10_000):
        for world_size in (1, 2, 5):
            rows = [range(size)[gallery_rows(size, rank, world_size)] for rank in range(world_size)]
            assert [row for part in rows for row in part] == list(range(size))


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

    result = retrieve(query, query_labels, Watched(), gallery_labels)
    assert result.metrics() == retrieve(query, query_labels, gallery, gallery_labels).metrics()
    assert max(asked) == 1024


def test_a_given_matrix_is_ranked_like_the_features_it_came_from():
    query, query_labels, gallery, gallery_labels = random_case(30, 80, 6, seed=2)
    distances = torch.cdist(query, gallery)
    by_matrix = retrieve_by_distance(distances, query_labels, gallery_labels)
    assert by_matrix.metrics() == retrieve(query, query_labels, gallery, gallery_labels).metrics()


def test_string_identities_and_unknown_cameras():
    """Queries of an unknown camera keep every positive; -1 equals no camera, not even -1."""
    query, gallery = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.1], [1.2]])
    query_labels = Labels(np.array(["a", "b"]), np.array([-1, 0]))
    gallery_labels = Labels(np.array(["a", "b"]), np.array([-1, 0]))
    result = retrieve(query, query_labels, gallery, gallery_labels)
    assert (result.valid_queries, result.queries, result.mAP) == (1, 2, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_is_named(bad):
    query, query_labels, gallery, gallery_labels = random_case(5, 3000, 3, seed=0)
    gallery[2345, 1] = bad
    with pytest.raises(ModelError, match="gallery feature of row 2345"):
        retrieve(query, query_labels, gallery, gallery_labels)


def test_mistakes_are_refused_with_their_remedy():
    features, labels = torch.zeros(2, 3), Labels(np.array([0, 1]), np.array([0, 1]))
    with pytest.raises(ModelError, match="none of 2 queries.*'camera'"):
        retrieve(features, labels, features, labels)
    with pytest.raises(ModelError, match="rule is 'cam'; known: camera, none, camera_time"):
        retrieve(features, labels, features, labels, rule="cam")
    with pytest.raises(ModelError, match="needs times"):
        retrieve(features, labels, features, labels, rule="camera_time")
    with pytest.raises(ModelError, match="no test image is in a list named 800, 1600, 2400"):
        vehicleid(features, labels.identities, np.array(["3200", ""]))


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
