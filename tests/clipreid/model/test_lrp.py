"""Rules of relevance propagation: cases done by hand, what is conserved, and the rules written with autograd."""

import pytest
import torch

from clipreid.model.lrp import through_linear, through_product, through_sum
from tests.helpers.tolerances import close


def rows(*values):
    return torch.tensor([values], dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_linear_layer_hands_relevance_to_positive_contributions():
    """6 to 1 x 2 and -2 x -2, in proportion 2 : 4; -3 x 1 gets nothing, and the bias is not asked."""
    found = through_linear(rows(1, -3, -2), rows(2, 1, -2), rows(6))
    close(found, rows(2, 0, 4), atol=1e-7)


def test_a_product_gives_half_to_each_factor():
    """[1, 3] @ [2; 2] = 8 from 2 and 6: relevance 8 is 1 and 3 for either side."""
    left, right = through_product(rows([1, 3]), rows([2], [2]), rows([8]))
    close(left, rows([1, 3]), atol=1e-7)
    close(right, rows([1], [3]), atol=1e-7)


def test_a_skip_connection_shares_in_proportion_to_the_sides():
    """[3, 1] + [1, 3] with relevance [4, 4]: 3 + 1 for the one, 1 + 3 for the other."""
    left, right = through_sum(rows(3, 1), rows(1, 3), rows(4, 4))
    close(left, rows(3, 1), atol=1e-7)
    close(right, rows(1, 3), atol=1e-7)


def test_sides_that_nearly_cancel_do_not_explode():
    """100 - 99 = 1 would hand 100 and -99 on; normalised both keep the proportion of their sizes, 100 : 99."""
    left, right = through_sum(rows(100), rows(-99), rows(1))
    close(left, rows(100 / 199), atol=1e-7)
    close(right, rows(99 / 199), atol=1e-7)


def test_a_result_of_nothing_hands_nothing_on():
    zero = rows(0.0, 0.0)
    assert not through_linear(zero, rows(1, 1), rows(5)).any()
    assert not torch.stack(through_sum(zero, zero, rows(5, 5))).any()


@pytest.mark.parametrize("seed", range(5))
def test_every_rule_conserves_the_relevance_of_every_image(seed):
    relevance = random(3, 4, 5, seed=seed + 100).abs()
    total = relevance.sum((1, 2))

    def sums(*parts):
        return sum(part.flatten(1).sum(1) for part in parts)

    exact = {"rtol": 1e-6, "atol": 1e-6}
    close(sums(through_linear(random(3, 4, 40, seed=seed), random(5, 40, seed=9), relevance)), total, **exact)
    parts = through_product(random(3, 4, 6, seed=seed), random(3, 6, 5, seed=seed + 1), relevance)
    close(sums(*parts), total, **exact)
    close(sums(parts[0]), sums(parts[1]), **exact)
    parts = through_sum(random(3, 4, 5, seed=seed), random(3, 4, 5, seed=seed + 1), relevance)
    close(sums(*parts), total, **exact)


def test_an_image_does_not_count_for_another():
    one, two, relevance = random(2, 4, 5), random(2, 4, 5, seed=1), random(2, 4, 5, seed=2).abs()
    both = through_sum(one, two, relevance)
    alone = [through_sum(one[i : i + 1], two[i : i + 1], relevance[i : i + 1]) for i in range(2)]
    for side in range(2):
        close(both[side], torch.cat([alone[0][side], alone[1][side]]), rtol=1e-9)


def by_gradient(operation, inputs, relevance):
    """The general rule: input x gradient of the result, weighted by relevance / result."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    result = operation(*inputs)
    return [x * g for x, g in zip(inputs, torch.autograd.grad(result, inputs, relevance / result), strict=True)]


def test_rules_are_input_times_gradient_of_what_they_count():
    """The z+ rule of the two positive products; a product halved."""
    inputs, weight, relevance = random(2, 3, 6), random(4, 6, seed=1), random(2, 3, 4, seed=2).abs()

    def positive(x):
        return (x[..., None, :] * weight).clamp(min=0).sum(-1)

    close(
        through_linear(inputs, weight, relevance), by_gradient(positive, [inputs], relevance)[0], rtol=1e-6, atol=1e-8
    )
    left, right = random(2, 3, 6), random(2, 6, 4, seed=1)
    halves = by_gradient(torch.matmul, [left, right], relevance / 2)
    for found, half in zip(through_product(left, right, relevance), halves, strict=True):
        close(found, half, rtol=1e-6, atol=1e-8)
