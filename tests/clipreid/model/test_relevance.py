"""Relevance maps: the written-out pass computes the encoder's features, relevance is conserved through all layers, the
maps are those of the published procedure, and they find what was put there."""

import pytest
import torch
from torch.nn import functional as F

from clipreid.model.relevance import _trace_resnet, _trace_vit, attention_relevance, relevance_maps, through_block
from clipreid.weights.initial import build_models
from tests.helpers.settings import model_spec
from tests.helpers.tolerances import close

ARCHS = {"vit": "configs/models/small_vit.json", "rn": "configs/models/small_rn.json"}
TRACES = {"vit": _trace_vit, "rn": _trace_resnet}


def encoder_of(kind):
    spec = model_spec(ARCHS[kind], image_size=(64, 32), identities=4)
    model, *_ = build_models(spec, seed=1)
    return model.eval().image_encoder


def images_and_targets(encoder, count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 64, 32, generator=generator, dtype=dtype)
    return images, torch.randn(count, encoder.widths[2], generator=generator, dtype=dtype)


@pytest.mark.parametrize("kind", ARCHS)
def test_the_pass_written_out_gives_the_encoders_feature(kind):
    encoder = encoder_of(kind)
    images, _ = images_and_targets(encoder)
    trace = TRACES[kind](encoder, images)
    close(trace.feature, encoder(images).proj, rtol=1e-5, atol=1e-5)
    for attention in trace.attentions:
        close(attention.sum(-1), torch.ones(attention.shape[:-1]), rtol=1.3e-6, atol=1e-5)


def test_relevance_is_conserved_through_all_blocks():
    """1 for every image goes in behind the last block, 1 arrives before the first; half of what passes a block's
    attention is its own. In float64, where the quotients' epsilon is what is lost."""
    encoder = encoder_of("vit").double()
    images, _ = images_and_targets(encoder, dtype=torch.float64)
    with torch.no_grad():
        trace = _trace_vit(encoder, images)
        relevance = torch.zeros_like(trace.blocks[-1].out)
        relevance[:, 0] = torch.rand_like(relevance[:, 0])
        relevance /= relevance.sum((1, 2), keepdim=True)
        for block in reversed(trace.blocks):
            relevance, _ = through_block(block, relevance)
            close(relevance.sum((1, 2)), torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def quotient(a, b):
    return a / (b + 1e-9 * b.sign())


class Published:
    """The published procedure for one image, with autograd for every rule: input x gradient of the result."""

    def linear(self, x, weight, relevance):
        x = x.detach().requires_grad_()
        result = F.linear(x.clamp(min=0), weight.clamp(min=0)) + F.linear(x.clamp(max=0), weight.clamp(max=0))
        return x * torch.autograd.grad(result, x, quotient(relevance, result))[0]

    def simple(self, operation, inputs, relevance):
        inputs = [x.detach().requires_grad_() for x in inputs]
        result = operation(*inputs)
        return [
            x * g for x, g in zip(inputs, torch.autograd.grad(result, inputs, quotient(relevance, result)), strict=True)
        ]

    def add(self, a, b, relevance):
        sides = self.simple(torch.add, [a, b], relevance)
        sizes = [side.sum().abs() for side in sides]
        return [
            side * quotient(size / sum(sizes) * relevance.sum(), side.sum())
            for side, size in zip(sides, sizes, strict=True)
        ]

    def maps(self, encoder, image, target):
        """Relevance x gradient of every block's attention, and their rollout with L x L matrices."""
        trace = _trace_vit(encoder, image[None])
        score = F.cosine_similarity(trace.feature[0], target, dim=0)
        gradients = torch.autograd.grad(score, trace.attentions)
        out = trace.blocks[-1].out
        relevance = torch.zeros_like(out)
        of_feature = self.linear(trace.feature, target[None], torch.ones(1, 1, dtype=image.dtype))
        relevance[:, 0] = self.linear(encoder.ln_post(out[:, 0]), encoder.proj.T, of_feature)
        whole = torch.eye(out.shape[1], dtype=image.dtype)
        product = whole
        for block, gradient in zip(reversed(trace.blocks), reversed(gradients), strict=True):
            relevance, of_attention = self.block(block, relevance)
            product = product @ (whole + (gradient[0] * of_attention[0]).clamp(min=0).mean(0))
        return product[0, 1:]

    def block(self, t, relevance):
        own, mlp = t.block.attn, t.block.mlp
        one, two = self.add(t.between, t.from_mlp, relevance)
        two = self.linear(t.normed_between, mlp.c_fc.weight, self.linear(t.hidden, mlp.c_proj.weight, two))
        one, two = self.add(t.tokens, t.from_attention, one + two)
        two = self.linear(t.attended, own.out_proj.weight, two).unflatten(2, (own.num_heads, -1)).transpose(1, 2)
        of_attention, of_values = (part / 2 for part in self.simple(torch.matmul, [t.attention, t.values], two))
        dots = lambda q, k: torch.einsum("bnid,bnjd->bnij", q, k)  # noqa: E731
        of_queries, of_keys = (part / 2 for part in self.simple(dots, [t.queries, t.keys], of_attention))
        parts = [part.transpose(1, 2).flatten(2) for part in (of_queries, of_keys, of_values)]
        return one + self.linear(t.normed, own.in_proj_weight, torch.cat(parts, 2)), of_attention


def test_maps_of_a_vit_are_those_of_the_published_procedure():
    """One image after the other, every rule by autograd, with the whole L x L product of the layers."""
    encoder = encoder_of("vit").double()
    images, targets = images_and_targets(encoder, dtype=torch.float64)
    maps = relevance_maps(encoder, images, targets)
    assert maps.shape == (3, *encoder.grid) and not maps.requires_grad
    for image, target, found in zip(images, targets, maps, strict=True):
        patches = Published().maps(encoder, image, target).detach()
        patches = (patches - patches.min()) / (patches.max() - patches.min())
        close(found.flatten(), patches, rtol=1e-6, atol=1e-6)


def test_maps_of_a_vit_are_not_those_of_attention_alone():
    """The ICCV 2021 rule weights gradients by attention, this one by the relevance of attention."""
    encoder = encoder_of("vit")
    images, targets = images_and_targets(encoder)
    trace = _trace_vit(encoder, images)
    for relevance, attention in zip(attention_relevance(encoder, trace, targets), trace.attentions, strict=True):
        assert not torch.allclose(relevance / relevance.sum(), attention / attention.sum(), rtol=0.1)


def test_maps_of_a_resnet_are_gradient_times_attention_of_its_pool():
    encoder = encoder_of("rn")
    images, targets = images_and_targets(encoder)
    maps = relevance_maps(encoder, images, targets)
    assert maps.shape == (3, *encoder.grid) and not maps.requires_grad
    for image, target, found in zip(images, targets, maps, strict=True):
        trace = _trace_resnet(encoder, image[None])
        score = torch.cosine_similarity(trace.feature[0], target, dim=0)
        (attention,) = trace.attentions
        (gradient,) = torch.autograd.grad(score, attention)
        patches = (gradient[0] * attention[0]).clamp(min=0).mean(0).detach()[0, 1:]
        patches = (patches - patches.min()) / (patches.max() - patches.min())
        close(found.flatten(), patches, rtol=1e-4, atol=1e-5)


def test_a_patch_that_decides_the_score_is_found():
    """The target is the feature of an image that differs in one patch only. With random weights the rules for products
    of both signs leave noise, yet few of the 31 other patches come before it; by chance half of them would."""
    encoder = encoder_of("vit").double()
    with torch.no_grad():
        encoder.positional_embedding *= 0.1
    generator = torch.Generator().manual_seed(0)
    rows, columns = encoder.grid
    patch = 64 // rows
    before = []
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        images = torch.zeros(1, 3, 64, 32, dtype=torch.float64)
        images[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 3 * torch.randn(
            1, 3, patch, patch, generator=generator, dtype=torch.float64
        )
        targets = encoder(images).proj.detach() - encoder(torch.zeros_like(images)).proj.detach()
        found = relevance_maps(encoder, images, targets).flatten()
        before.append(int((found > found[place]).sum()))
    assert sum(before) / len(before) < 4
