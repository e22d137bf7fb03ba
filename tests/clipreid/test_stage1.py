"""Stage 1's step: against the reference figures, a loop over single images, and itself on other numbers of ranks."""

import numpy as np
import pytest
import torch

from clipreid.optim import adam, parameter_groups
from clipreid.peers import rank_slice
from clipreid.stage1 import average_step, batches, identity_means, step, text_features
from tests.helpers.golden_models import case_models, case_spec, read_case, scaled_error
from tests.helpers.rank_threads import run_ranks
from tests.helpers.tables import gradient_of, table_of
from tests.helpers.tolerances import close, within

IDENTITIES, WIDTH = 9, 6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "net"), [("stage1_person_512", "vit"), ("stage1_vehicle_1024", "rn50")])
def test_prompt_learning_matches_the_reference_figures(name, net):
    """Text features, loss parts of every batch, token gradients, and all tokens after the Adam steps."""
    golden, case = read_case(name)
    _, text, tables = case_models(case_spec(case, net, noun=case["template"]), net)
    tokens, lr = tables.tokens, float(golden["lr"])
    optimizer = adam(parameter_groups([("tokens", tokens.block)], float(golden["weight_decay"])))
    optimizer.param_groups[0]["lr"] = lr
    for k in range(len(case["batches"])):
        images, labels = (torch.from_numpy(golden[f"{key}{k}"]) for key in ("image_features", "labels"))
        losses = step(text, tokens, images, labels)
        for part, reference in zip(("i2t", "t2i", "loss"), golden["loss_parts"][k], strict=True):
            close(losses[part], reference, rtol=1e-5, what=part)
        losses["loss"].backward()
        tokens.block.grad = gradient_of(tokens)
        if k == 0:
            within(scaled_error(text(tokens.block[labels]), golden["text_features0"]), 2e-5)
            within(scaled_error(tokens.block.grad, golden["grad_tokens0"]), 2e-5)
        optimizer.step()
        tokens.clear_gradient()
    off = (tokens.block.detach().double() - torch.from_numpy(golden["tokens_after"])).abs() / lr
    within((off >= 0.02).double().mean(), 0.001)
    within(off.max(), 0.5)
    assert all(p.grad is None for p in text.text_encoder.parameters())


class Text:
    """Stands for the text tower: an identity's row, whose last number is its label, is its feature; and what was asked
    for."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        rows = torch.randn(IDENTITIES, WIDTH, dtype=torch.float64, generator=generator)
        self.rows = torch.cat([rows, torch.arange(IDENTITIES)[:, None]], dim=1)
        self.asked = []

    @property
    def features(self):
        return self.rows[:, :WIDTH]

    def __call__(self, rows):
        self.asked.append(rows[:, WIDTH].long().tolist())
        return rows[:, :WIDTH]


def gradient_of_all(tables):
    """Of the whole table, from the ranks' blocks, after a backward pass of the sum of their losses."""
    return torch.cat([gradient_of(table) for table in tables])[:, :WIDTH]


def toy_batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(IDENTITIES - 2, (size,), generator=generator)
    return torch.randn(size, WIDTH, dtype=torch.float64, generator=generator), labels


def per_image_losses(texts, images, labels):
    """The contrastive losses (Eq. 2 and 4) word for word: every image with a text of its own, one at a time."""
    rows = [texts[label] for label in labels.tolist()]
    n = len(rows)
    i2t = [torch.stack([image @ row for row in rows]).logsumexp(0) - image @ rows[i] for i, image in enumerate(images)]
    t2i = []
    for i, row in enumerate(rows):
        similarity = torch.stack([row @ image for image in images])
        positives = [j for j in range(n) if labels[j] == labels[i]]
        t2i.append(similarity.logsumexp(0) - similarity[positives].mean())
    return {"i2t": sum(i2t) / n, "t2i": sum(t2i) / n, "loss": (sum(i2t) + sum(t2i)) / n}


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_mean_over_ranks_equals_the_loop_over_images(size, world_size):
    """Parts are unequal, and empty where ranks outnumber images; identities repeat."""
    images, labels = toy_batch(size)
    text = Text()
    features = text.features.requires_grad_()
    expected = per_image_losses(features, images, labels)
    (gradient,) = torch.autograd.grad(expected["loss"], features)

    def one_rank(peers):
        tokens = table_of(text.rows, peers)
        return tokens, step(text, tokens, images, labels, peers)

    tables, losses = zip(*run_ranks(world_size, one_rank), strict=True)
    for name, value in expected.items():
        torch.testing.assert_close(sum(part[name] for part in losses) / world_size, value)
    sum(part["loss"] for part in losses).backward()
    torch.testing.assert_close(gradient_of_all(tables), gradient)


@pytest.mark.parametrize("size", [1, 2, 5, IDENTITIES])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_average_variant_is_equation_10_over_all_identities(size, world_size):
    """A double loop: text y against the means of all N, whatever the batch holds; the mean over the batch's texts."""
    generator = torch.Generator().manual_seed(size)
    means = torch.randn(IDENTITIES, WIDTH, dtype=torch.float64, generator=generator)
    batch = torch.randperm(IDENTITIES, generator=generator)[:size]
    text = Text()
    features, expected = text.features.requires_grad_(), 0.0
    for y in batch.tolist():
        scores = [(means[a] * features[y]).sum().exp() for a in range(IDENTITIES)]
        expected = expected - (scores[y] / sum(scores)).log() / size
    (gradient,) = torch.autograd.grad(expected, features)

    def one_rank(peers):
        tokens = table_of(text.rows, peers)
        return tokens, average_step(text, tokens, table_of(means, peers, frozen=True), batch, peers)

    tables, losses = zip(*run_ranks(world_size, one_rank), strict=True)
    assert all(set(part) == {"t2i", "loss"} and part["t2i"] is part["loss"] for part in losses)
    loss = sum(part["loss"] for part in losses)
    torch.testing.assert_close(loss / world_size, expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    torch.testing.assert_close(gradient_of_all(tables), gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_distinct_identity_is_encoded_once(world_size):
    images, labels = toy_batch(16)
    text = Text()

    def one_rank(peers):
        return step(text, table_of(text.rows, peers), images, labels, peers)

    run_ranks(world_size, one_rank)
    distinct = set(labels.tolist())
    share = -(-len(distinct) // world_size)
    assert sorted(map(len, text.asked)) == [share] * world_size
    assert {label for call in text.asked for label in call} == distinct


@pytest.mark.parametrize("world_size", [1, 2, 4, 12])
def test_every_rank_encodes_the_identities_that_it_owns(world_size):
    """Also where ranks outnumber identities."""
    text = Text()
    tables = run_ranks(world_size, lambda p: text_features(text, table_of(text.rows, p), p, batch_size=4))
    assert torch.equal(torch.cat([table.block for table in tables]), text.features)
    assert all(not table.block.requires_grad and table.block.shape[1] == WIDTH for table in tables)


@pytest.mark.parametrize(("images", "batch"), [(10, 4), (8, 4), (3, 64), (65, 64)])
def test_an_epoch_visits_every_image_once_and_no_batch_is_empty(images, batch):
    parts = batches(images, batch, seed=3, epoch=2)
    assert sorted(np.concatenate(parts).tolist()) == list(range(images))
    assert [len(part) for part in parts[:-1]] == [batch] * (len(parts) - 1) and 0 < len(parts[-1]) <= batch


def test_batches_depend_on_seed_and_epoch_alone():
    first = np.concatenate(batches(50, 8, seed=1, epoch=1))
    assert np.array_equal(first, np.concatenate(batches(50, 8, seed=1, epoch=1)))
    assert not np.array_equal(first, np.concatenate(batches(50, 8, seed=1, epoch=2)))
    assert not np.array_equal(first, np.concatenate(batches(50, 8, seed=2, epoch=1)))


def test_rank_slices_are_contiguous_and_differ_by_one_at_most():
    for n in range(12):
        for world_size in range(1, 6):
            parts = [rank_slice(n, rank, world_size) for rank in range(world_size)]
            assert [i for part in parts for i in range(n)[part]] == list(range(n))
            sizes = [part.stop - part.start for part in parts]
            assert max(sizes) - min(sizes) <= 1


class Mapped:
    """Stands for a bank that is larger than memory: rows are given out in parts only."""

    def __init__(self, rows):
        self.rows, self.shape, self.dtype = rows, rows.shape, rows.dtype

    def __getitem__(self, part):
        assert isinstance(part, slice) and part.stop - part.start <= len(self.rows) / 2
        return self.rows[part]


def test_identity_means_are_means_over_images_of_a_bank_read_in_parts():
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((20_000, 3), np.float32), rng.permutation(20_000) % 4
    means = identity_means(Mapped(features), labels, 4).block.numpy()
    assert means.dtype == np.float32
    parts = run_ranks(3, lambda peers: identity_means(Mapped(features), labels, 4, peers).block)
    assert np.array_equal(torch.cat(parts).numpy(), means)
    for label in range(4):
        close(means[label], features[labels == label].mean(0, dtype=np.float64), rtol=1e-7, atol=1e-7)
