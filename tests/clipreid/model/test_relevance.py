"""Relevance maps: the written-out attention computes the encoder's features, and the maps find what was put there."""

import pytest
import torch

from clipreid.model.relevance import _attended, relevance_maps
from clipreid.weights.initial import build_models
from tests.helpers.settings import model_spec
from tests.helpers.tolerances import close

ARCHS = {"vit": "configs/models/small_vit.json", "rn": "configs/models/small_rn.json"}


def encoder_of(kind):
    spec = model_spec(ARCHS[kind], image_size=(64, 32), identities=4)
    model, _ = build_models(spec, seed=1)
    return model.eval().image_encoder


@pytest.mark.parametrize("kind", ARCHS)
def test_attention_written_out_gives_the_encoders_feature(kind):
    encoder = encoder_of(kind)
    images = torch.randn(3, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    feature, attentions = _attended(encoder, images)
    close(feature, encoder(images).proj, rtol=1e-5, atol=1e-5)
    for attention in attentions:
        close(attention.sum(-1), torch.ones(attention.shape[:-1]), rtol=1.3e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHS)
def test_maps_are_those_of_the_published_procedure(kind):
    """One image after the other, with the whole L x L product of the layers' relevance."""
    encoder = encoder_of(kind)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 64, 32, generator=generator)
    targets = torch.randn(3, encoder.widths[2], generator=generator)
    maps = relevance_maps(encoder, images, targets)
    assert maps.shape == (3, *encoder.grid) and not maps.requires_grad
    for image, target, found in zip(images, targets, maps, strict=True):
        feature, attentions = _attended(encoder, image[None])
        score = torch.cosine_similarity(feature[0], target, dim=0)
        size = attentions[0].shape[-1]
        whole = torch.eye(size)
        for attention, gradient in zip(attentions, torch.autograd.grad(score, attentions), strict=True):
            layer = torch.zeros(size, size)
            layer[: attention.shape[2]] = (gradient[0] * attention[0]).clamp(min=0).mean(0).detach()
            whole = whole + layer @ whole
        patches = whole[0, 1:]
        patches = (patches - patches.min()) / (patches.max() - patches.min())
        close(found.flatten(), patches, rtol=1e-4, atol=1e-5)


def test_a_patch_that_decides_the_score_is_found():
    """The target is the feature of an image that differs in one patch only: that patch is the most relevant one."""
    encoder = encoder_of("vit")
    with torch.no_grad():
        encoder.positional_embedding *= 0.1
    generator = torch.Generator().manual_seed(0)
    rows, columns = encoder.grid
    patch = 64 // rows
    hits = 0
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        images = torch.full((1, 3, 64, 32), 0.0)
        images[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 3 * torch.randn(
            1, 3, patch, patch, generator=generator
        )
        targets = encoder(images).proj.detach() - encoder(torch.zeros_like(images)).proj.detach()
        hits += int(relevance_maps(encoder, images, targets).flatten().argmax()) == place
    assert hits >= 0.8 * rows * columns
