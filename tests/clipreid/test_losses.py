"""Losses against the reference figures and against loops over single images."""

import pytest
import torch

from clipreid.losses import batch_hard_triplet, image_to_text, text_to_image
from tests.helpers.golden_models import read_case, scaled_error
from tests.helpers.tolerances import close, within

GOLDEN, CASE = read_case("losses")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("tag", [triplet[0] for triplet in CASE["triplets"]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_triplet_matches_the_reference_figures(tag, dtype, tolerance):
    features = torch.from_numpy(GOLDEN[f"triplet_{tag}__features"]).to(dtype).requires_grad_()
    labels = torch.from_numpy(GOLDEN[f"triplet_{tag}__labels"])
    loss = batch_hard_triplet(features, labels, features, labels, CASE["margin"])
    loss.backward()
    reference = float(GOLDEN[f"triplet_{tag}__loss"])
    close(loss, reference, rtol=tolerance)
    gradient = GOLDEN[f"triplet_{tag}__grad"]
    if GOLDEN[f"triplet_{tag}__active"] == 0:
        assert not features.grad.any() and not gradient.any()
    else:
        within(scaled_error(features.grad, gradient), tolerance)


@pytest.mark.parametrize("tag", [triplet[0] for triplet in CASE["triplets"]])
def test_the_hardest_positive_and_negative_are_those_of_the_reference(tag):
    """Their distances one by one: the anchor itself, 1e-6 away after the clamp, takes the place of the other side."""
    features = torch.from_numpy(GOLDEN[f"triplet_{tag}__features"]).double()
    labels = torch.from_numpy(GOLDEN[f"triplet_{tag}__labels"])
    margin = 100.0
    for i, label in enumerate(labels):
        anchor, itself, same = features[i : i + 1], 1e-6, labels == label
        positives, negatives = torch.cat([features[same], anchor]), torch.cat([features[~same], anchor])
        as_negative, as_positive = torch.cat([labels[same], label[None] + 1]), torch.cat([labels[~same], label[None]])
        farthest = batch_hard_triplet(anchor, label[None], positives, as_negative, 0.0) + itself
        nearest = margin + itself - batch_hard_triplet(anchor, label[None], negatives, as_positive, margin)
        assert farthest.item() == pytest.approx(GOLDEN[f"triplet_{tag}__d_pos"][i], rel=1e-7)
        assert nearest.item() == pytest.approx(GOLDEN[f"triplet_{tag}__d_neg"][i], rel=1e-7)


def test_anchors_may_be_a_part_of_the_batch():
    features, labels = random(12, 6), torch.arange(4).repeat_interleave(3)
    whole = batch_hard_triplet(features, labels, features, labels, 0.3)
    parts = [batch_hard_triplet(features[i : i + 3], labels[i : i + 3], features, labels, 0.3) for i in (0, 3, 6, 9)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_tied_triplets_choose_the_first_row():
    """Two equally far positives and negatives: the gradient goes to the first of each, not to a mixture."""
    features = torch.tensor([[0.0], [1.0], [-1.0], [2.0], [-2.0], [9.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    batch_hard_triplet(features[:1], labels[:1], features, labels, margin=3.0).backward()
    assert features.grad.flatten().tolist() == [0.0, 1.0, 0.0, -1.0, 0.0, 0.0]


def test_contrastive_losses_match_a_double_loop_over_images():
    labels = [4, 0, 4, 4, 2, 0]
    images, by_identity = random(6, 5, seed=1), random(5, 5, seed=2)
    texts = by_identity[labels]
    i2t = image_to_text(images, texts, texts)
    t2i = text_to_image(texts, torch.tensor(labels), images, torch.tensor(labels))
    for i, own in enumerate(labels):
        over_texts = sum(torch.exp(images[i] @ by_identity[label]) for label in labels)
        assert float(i2t[i]) == pytest.approx(float(over_texts.log() - images[i] @ by_identity[own]))
        over_images = sum(torch.exp(image @ by_identity[own]) for image in images)
        log_probs = [images[j] @ by_identity[own] - over_images.log() for j in range(6) if labels[j] == own]
        assert float(t2i[i]) == pytest.approx(float(-sum(log_probs) / len(log_probs)))


def test_an_empty_part_gives_no_loss_and_still_has_a_gradient():
    texts = random(4, 3).requires_grad_()
    none = torch.zeros(0, 3, dtype=torch.float64)
    loss = image_to_text(none, texts[:0], texts).sum()
    loss = loss + text_to_image(texts[:0], torch.zeros(0, dtype=torch.int64), random(4, 3), torch.arange(4)).sum()
    loss.backward()
    assert float(loss.detach()) == 0 and not texts.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_the_losses(dtype):
    """Under autocast, and for half-precision features, everything is computed in float32."""
    labels = torch.arange(8).repeat_interleave(2)
    features, texts = random(16, 64, dtype=dtype) * 5, random(16, 64, seed=1, dtype=dtype)
    double = features.double(), texts.double()

    def losses(features, texts):
        return (
            batch_hard_triplet(features, labels, features, labels, 0.3),
            image_to_text(features, texts, texts).mean(),
            text_to_image(texts, labels, features, labels).mean(),
        )

    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = losses(features, texts)
    for value, exact in zip(low, losses(*double), strict=True):
        assert value.dtype == torch.float32
        close(value, exact, rtol=1e-5, atol=1e-5)
