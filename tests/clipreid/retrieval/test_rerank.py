"""k-reciprocal re-ranking against the reference figures and against the published procedure, image by image."""

import numpy as np
import pytest
import torch

from clipreid.errors import ModelError
from clipreid.retrieval import rerank as module
from clipreid.retrieval.metrics import retrieve, retrieve_by_distance
from clipreid.retrieval.positives import Labels
from clipreid.retrieval.rerank import evaluate_reranked, rerank, reranked
from tests.helpers.devices import DEVICES
from tests.helpers.golden_models import read_case
from tests.helpers.rank_threads import run_ranks
from tests.helpers.tolerances import close


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_distances_match_the_reference_figures(dtype, tolerance, device):
    golden, case = read_case("rerank_k20_6")
    query, gallery = (torch.from_numpy(golden[f"{side}_feat"]).to(device, dtype) for side in "qg")
    distances = rerank(query, gallery, case["k1"], case["k2"], case["lam"]).cpu()
    assert distances.dtype == dtype
    close(distances, golden["distance"], atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_measures_match_the_reference_figures(device):
    golden, case = read_case("rerank_k20_6")
    query, gallery = (torch.from_numpy(golden[f"{side}_feat"]).to(device) for side in "qg")
    labels = Labels(golden["q_pid"]), Labels(golden["g_pid"])
    settings = {name: case[name] for name in ("k1", "k2", "lam")}
    metrics = evaluate_reranked(query, labels[0], gallery, labels[1], rule="none", **settings)
    close(metrics["mAP"], golden["mAP"], atol=1e-6)
    close([metrics[f"R{r}"] for r in (1, 5, 10)], golden["cmc_1_5_10"], atol=1e-6)


def slow_rerank(query, gallery, k1, k2, lam):
    """Full matrices and sets, one image at a time. float64 [Q, D], [G, D] -> [Q, G]."""
    features = np.concatenate([query, gallery])
    n = len(features)
    original = ((features[:, None] - features[None]) ** 2).sum(2)
    original /= original.max(1, keepdims=True)
    order = np.argsort(original, axis=1, kind="stable")

    def reciprocal(i, k):
        return {j for j in order[i, : k + 1] if i in order[j, : k + 1]}

    weights = np.zeros((n, n))
    for i in range(n):
        own = reciprocal(i, k1)
        members = set(own)
        for j in own:
            theirs = reciprocal(j, round(k1 / 2))
            if len(theirs & own) > 2 / 3 * len(theirs):
                members |= theirs
        members = sorted(members)
        weights[i, members] = np.exp(-original[i, members])
        weights[i] /= weights[i].sum()
    weights = np.stack([weights[order[i, :k2]].mean(0) for i in range(n)])
    jaccard = 1 - np.minimum(weights[:, None], weights[None]).sum(2) / np.maximum(weights[:, None], weights[None]).sum(
        2
    )
    q = len(query)
    return lam * original[:q, q:] + (1 - lam) * jaccard[:q, q:]


@pytest.mark.parametrize(("k1", "k2", "lam"), [(20, 6, 0.3), (7, 3, 0.5), (5, 1, 0.0), (2, 4, 0.3), (1, 1, 1.0)])
def test_blocks_and_sparse_rows_equal_the_full_matrices(monkeypatch, k1, k2, lam):
    monkeypatch.setattr(module, "BLOCK", 16)
    rng = np.random.default_rng(k1)
    centres = rng.standard_normal((9, 5))
    query, gallery = (centres[rng.integers(0, 9, n)] + 0.5 * rng.standard_normal((n, 5)) for n in (13, 50))
    distances = rerank(torch.from_numpy(query), torch.from_numpy(gallery), k1, k2, lam)
    np.testing.assert_allclose(distances.numpy(), slow_rerank(query, gallery, k1, k2, lam), atol=1e-12)


def clusters(seed=0):
    """40 queries and 70 gallery images of 12 identities and their labels: the arguments of evaluate_reranked."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, 6))
    sides = []
    for n in (40, 70):
        identities = rng.integers(0, 12, n)
        features = (centres[identities] + 0.6 * rng.standard_normal((n, 6))).astype(np.float32)
        sides += [torch.from_numpy(features), Labels(identities, rng.integers(0, 3, n))]
    return sides


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_result_is_bitwise_the_same_on_any_number_of_ranks(world_size, monkeypatch):
    """Three blocks of queries, so that of four ranks one has none."""
    monkeypatch.setattr(module, "BLOCK", 16)
    query, query_labels, gallery, gallery_labels = sides = clusters()
    settings = {"k1": 9, "k2": 4, "lam": 0.3}
    alone, measured = rerank(query, gallery, **settings), evaluate_reranked(*sides, rule="camera", **settings)

    def one_rank(peers):
        mapped, options = gallery.numpy(), settings | {"peers": peers}
        metrics = evaluate_reranked(query, query_labels, mapped, gallery_labels, rule="camera", **options)
        return list(reranked(query, mapped, **options)), metrics

    seen = []
    for blocks, metrics in run_ranks(world_size, one_rank):
        assert metrics == measured
        for rows, distances in blocks:
            assert torch.equal(distances, alone[rows])
            seen += range(len(query))[rows]
    assert sorted(seen) == list(range(len(query)))
    expected = retrieve_by_distance(alone, query_labels, gallery_labels, rule="camera").metrics()
    assert measured == expected != retrieve(*sides, rule="camera").metrics()


def test_images_that_are_all_the_same_are_ranked_without_a_crash():
    query, gallery = Labels(np.arange(3)), Labels(np.arange(9) % 3)
    settings = {"rule": "none", "k1": 4, "k2": 2, "lam": 0.3}
    metrics = evaluate_reranked(torch.ones(3, 4), query, torch.ones(9, 4), gallery, **settings)
    assert 0 < metrics["mAP"] <= 1 and metrics["valid_queries"] == 3


def test_features_that_are_not_finite_are_refused():
    gallery = torch.randn(30, 4)
    gallery[7, 2] = torch.nan
    with pytest.raises(ModelError, match="not finite: extract them again"):
        rerank(torch.randn(5, 4), gallery, 5, 2, 0.3)


def test_half_precision_features_are_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 8, generator=generator).bfloat16() for n in (6, 40))
    distances = rerank(query, gallery, 5, 3, 0.3)
    assert distances.dtype == torch.float32
    close(distances, rerank(query.double(), gallery.double(), 5, 3, 0.3), atol=1e-5)


def test_too_few_images_are_refused():
    with pytest.raises(ModelError, match="k1 20, k2 6 needs 1 <= k1 < 12"):
        rerank(torch.randn(2, 3), torch.randn(10, 3), 20, 6, 0.3)
