"""Cross-entropy over all identities, of which every rank holds some: the reference's figures, and torch's own."""

import pytest
import torch
from torch.nn import functional as F

from clipreid.identity_softmax import identity_cross_entropy
from tests.helpers.golden_models import read_case, scaled_error
from tests.helpers.rank_threads import run_ranks
from tests.helpers.tables import table_of
from tests.helpers.tolerances import close, within

GOLDEN, CASE = read_case("losses")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("tag", [smoothed[0] for smoothed in CASE["smoothed"]])
def test_cross_entropy_matches_the_reference_figures(tag):
    """Features that are the logits, before rows that are those of the unit matrix."""
    scores = torch.from_numpy(GOLDEN[f"ce_{tag}__scores"]).requires_grad_()
    labels = torch.from_numpy(GOLDEN[f"ce_{tag}__labels"])
    table = table_of(torch.eye(scores.shape[1], dtype=scores.dtype))
    loss = identity_cross_entropy(scores, labels, table, float(GOLDEN[f"ce_{tag}__eps"]))
    loss.backward()
    close(loss, GOLDEN[f"ce_{tag}__loss"], rtol=1e-6)
    within(scaled_error(scores.grad, GOLDEN[f"ce_{tag}__grad"]), 1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("identities", "world_size"), [(7, 1), (7, 2), (7, 3), (7, 4), (8, 8), (5, 8), (1, 3)])
def test_any_number_of_ranks_gives_the_loss_and_gradients_of_one_softmax(identities, world_size, smoothing):
    """Also where N is not divisible, and where ranks own no identity."""
    features, rows = random(6, 4), random(identities, 4, seed=1)
    labels = torch.randint(identities, (6,), generator=torch.Generator().manual_seed(2))
    whole = [tensor.clone().requires_grad_() for tensor in (features, rows)]
    expected = F.cross_entropy(whole[0] @ whole[1].T, labels, label_smoothing=smoothing)
    expected.backward()

    features.requires_grad_()

    def one_rank(peers):
        table = table_of(rows, peers)
        return table, identity_cross_entropy(features, labels, table, smoothing, peers)

    tables, losses = zip(*run_ranks(world_size, one_rank), strict=True)
    for loss in losses:
        torch.testing.assert_close(loss, expected)
    sum(losses).backward()  # The gather sums over ranks, and the engine averages.
    torch.testing.assert_close(features.grad / world_size, whole[0].grad)
    torch.testing.assert_close(torch.cat([table.block.grad for table in tables]), whole[1].grad)


def test_logits_that_would_overflow_do_not():
    features, rows = random(4, 3) * 1e4, random(9, 3, seed=1)
    labels = torch.tensor([0, 3, 3, 8])
    torch.testing.assert_close(
        identity_cross_entropy(features, labels, table_of(rows)), F.cross_entropy(features @ rows.T, labels)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_it(dtype):
    features, rows, labels = random(16, 64, dtype=dtype), random(40, 64, seed=1, dtype=torch.float32), torch.arange(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = identity_cross_entropy(features, labels, table_of(rows), 0.1)
    exact = F.cross_entropy(features.double() @ rows.double().T, labels, label_smoothing=0.1)
    assert low.dtype == torch.float32
    close(low, exact, rtol=1e-5, atol=1e-5)


def test_what_crosses_ranks_does_not_grow_with_the_identities():
    """Numbers handed to collectives, per rank."""

    def sent(identities):
        def one_rank(peers):
            counted = Counting(peers)
            identity_cross_entropy(random(6, 4), torch.zeros(6, dtype=torch.int64), table_of(rows, peers), 0.1, counted)
            return counted.numbers

        rows = random(identities, 4)
        return run_ranks(2, one_rank)

    assert sent(10) == sent(1000) == [18, 18]


class Counting:
    """Peers that count."""

    def __init__(self, peers):
        self.peers, self.numbers = peers, 0
        self.rank, self.world_size = peers.rank, peers.world_size

    def all_reduce_sum(self, tensor):
        self.numbers += tensor.numel()
        return self.peers.all_reduce_sum(tensor)

    def all_reduce_max(self, tensor):
        self.numbers += tensor.numel()
        return self.peers.all_reduce_max(tensor)
