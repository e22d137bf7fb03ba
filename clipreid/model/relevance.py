"""Where in an image a feature comes from: relevance maps (Chefer, Gur, Wolf, CVPR 2021), Figure 3 of the paper.

    images, their identities' text features ──▶ [relevance] ──▶ a weight for every patch

The encoders' forward pass is repeated with attention written out, since the fused one does not give the weights
that the gradient is taken of and that relevance is handed back to.

B = images, L = tokens (1 + rows * columns), W = width of the tower, D = width of the text features, N = heads
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from clipreid.model.encoders import ImageEncoder, ResNetEncoder, ViTEncoder
from clipreid.model.lrp import through_linear, through_product, through_sum

if TYPE_CHECKING:
    from open_clip.transformer import ResidualAttentionBlock


def relevance_maps(encoder: ImageEncoder, images: Tensor, targets: Tensor) -> Tensor:
    """How much each patch speaks for the target: float [B, rows, columns], from 0 to 1 in every image.

    images: float [B, 3, H, W], normalised. targets: float [B, D], the features that an image's projected feature
    is compared with by cosine. Patches are a ViT's, or the places of a ResNet's last map. No side information is
    used, as in stage 1.

    Of a ViT by "Transformer interpretability beyond attention visualization" (CVPR 2021), Eq. 13 and 14: a layer's
    map is the identity plus the mean over heads of the positive part of gradient x relevance of its attention, where
    relevance comes from the score through all layers behind it (`lrp`); the layers' maps multiply, and the row of the
    class token is read. That method has no rule for a ResNet's attention pool, its one layer of attention: there it is
    gradient x attention, as in the same authors' ICCV 2021 paper.
    """
    with torch.enable_grad():
        trace = _trace_vit(encoder, images) if isinstance(encoder, ViTEncoder) else _trace_resnet(encoder, images)
        score = F.cosine_similarity(trace.feature, targets).sum()
        gradients = torch.autograd.grad(score, trace.attentions)
    with torch.no_grad():
        weights = trace.attentions
        if isinstance(encoder, ViTEncoder):
            weights = attention_relevance(encoder, trace, targets)
        rows = _rollout(weights, gradients)
    patches = rows[:, 1:]
    low, high = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
    return ((patches - low) / (high - low).clamp(min=torch.finfo(patches.dtype).tiny)).view(-1, *encoder.grid)


def _rollout(weights: list[Tensor], gradients: tuple[Tensor, ...]) -> Tensor:
    """The class token's row, [B, L], of the product of the layers' maps, last layer first (Eq. 13 and 14).

    weights, gradients: [B, N, queries, L] of each layer, from the first on.
    """
    row_BL = weights[-1].new_zeros(len(weights[-1]), weights[-1].shape[-1])
    row_BL[:, 0] = 1
    for weight, gradient in zip(reversed(weights), reversed(gradients), strict=True):
        layer_BQL = (gradient * weight).clamp(min=0).mean(1)
        row_BL = row_BL + torch.einsum("bq,bql->bl", row_BL[:, : layer_BQL.shape[1]], layer_BQL)
    return row_BL


@dataclass(frozen=True)
class BlockTrace:
    """What went through a block of a ViT, float [B, L, *] where nothing else is said."""

    block: "ResidualAttentionBlock"
    tokens: Tensor
    """Into the block."""
    normed: Tensor
    """Behind `ln_1`."""
    queries: Tensor
    """[B, N, L, W / N], as are keys and values."""
    keys: Tensor
    values: Tensor
    attention: Tensor
    """[B, N, L, L]."""
    attended: Tensor
    """Heads side by side."""
    from_attention: Tensor
    """What the attention adds to the tokens."""
    between: Tensor
    """The tokens with that."""
    normed_between: Tensor
    """Behind `ln_2`."""
    hidden: Tensor
    """Behind the MLP's activation."""
    from_mlp: Tensor
    """What the MLP adds."""

    @property
    def out(self) -> Tensor:
        return self.between + self.from_mlp


@dataclass(frozen=True)
class Trace:
    """What a forward pass leaves for the maps."""

    feature: Tensor
    """The projected feature, [B, D]."""
    attentions: list[Tensor]
    """Of every layer, [B, N, queries, L]."""
    blocks: list[BlockTrace]
    """Of a ViT."""


def attention_relevance(encoder: ViTEncoder, trace: Trace, targets: Tensor) -> list[Tensor]:
    """The relevance, [B, N, L, L], of every block's attention for an image's score, whose own relevance is 1.

    The score is a linear layer whose weights are the image's target, float [B, D], so by the z+ rule its relevance
    goes to the positive terms of the dot product. Lengths, which the cosine divides by, scale all values alike.
    """
    terms = (trace.feature * targets).clamp(min=0)
    of_feature = terms / terms.sum(1, keepdim=True).clamp(min=torch.finfo(terms.dtype).tiny)
    last = trace.blocks[-1].out
    relevance_BLW = torch.zeros_like(last)
    relevance_BLW[:, 0] = through_linear(encoder.ln_post(last[:, 0]), encoder.proj.T, of_feature)
    found = []
    for block in reversed(trace.blocks):
        relevance_BLW, of_attention = through_block(block, relevance_BLW)
        found.append(of_attention)
    return found[::-1]


def through_block(trace: BlockTrace, relevance_BLW: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of a block's result -> of its tokens, [B, L, W], and of its attention, [B, N, L, L]."""
    mlp = trace.block.mlp
    skipped, of_mlp = through_sum(trace.between, trace.from_mlp, relevance_BLW)
    of_hidden = through_linear(trace.hidden, mlp.c_proj.weight, of_mlp)
    of_between = skipped + through_linear(trace.normed_between, mlp.c_fc.weight, of_hidden)
    skipped, of_branch = through_sum(trace.tokens, trace.from_attention, of_between)
    of_tokens, of_attention = _through_attention(trace, of_branch)
    return skipped + of_tokens, of_attention


def _through_attention(trace: BlockTrace, relevance_BLW: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of what the attention adds -> of the normed tokens, and of the attention itself.

    Half of the attention's goes on to what it was made of (softmax passes it), the other half went to the values.
    """
    own = trace.block.attn
    of_attended = through_linear(trace.attended, own.out_proj.weight, relevance_BLW)
    of_heads = _split(of_attended, own.num_heads)
    of_attention, of_values = through_product(trace.attention, trace.values, of_heads)
    of_queries, of_keys = through_product(trace.queries, trace.keys.mT, of_attention)
    parts = (_join(part) for part in (of_queries, of_keys.mT, of_values))
    return through_linear(trace.normed, own.in_proj_weight, torch.cat(list(parts), dim=2)), of_attention


def _trace_vit(encoder: ViTEncoder, images: Tensor) -> Trace:
    x_BLW = encoder.ln_pre(encoder.embed(images))
    blocks = []
    for block in encoder.transformer.resblocks:
        blocks.append(_trace_block(block, x_BLW))
        x_BLW = blocks[-1].out
    feature = encoder.ln_post(x_BLW[:, 0]) @ encoder.proj
    return Trace(feature, [block.attention for block in blocks], blocks)


def _trace_block(block: "ResidualAttentionBlock", x_BLW: Tensor) -> BlockTrace:
    own, mlp = block.attn, block.mlp
    normed = block.ln_1(x_BLW)
    projected = F.linear(normed, own.in_proj_weight, own.in_proj_bias).chunk(3, dim=2)
    q, k, v = (_split(part, own.num_heads) for part in projected)
    attention = _attention(q, k)
    attended = _join(attention @ v)
    from_attention = block.ls_1(own.out_proj(attended))
    between = x_BLW + from_attention
    normed_between = block.ln_2(between)
    hidden = mlp.gelu(mlp.c_fc(normed_between))
    from_mlp = block.ls_2(mlp.c_proj(hidden))
    return BlockTrace(
        block, x_BLW, normed, q, k, v, attention, attended, from_attention, between, normed_between, hidden, from_mlp
    )


def _trace_resnet(encoder: ImageEncoder, images: Tensor) -> Trace:
    assert isinstance(encoder, ResNetEncoder)
    pool = encoder.attnpool
    _, layer4 = encoder.maps(images)
    x_BLC = encoder.pool_tokens(layer4)
    projected = pool.q_proj(x_BLC[:, :1]), pool.k_proj(x_BLC), pool.v_proj(x_BLC)
    q, k, v = (_split(part, pool.num_heads) for part in projected)
    attention = _attention(q, k)
    return Trace(pool.c_proj(_join(attention @ v))[:, 0], [attention], [])


def _attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Weights of scaled dot-product attention, [B, N, queries, keys], whose gradient can be asked for."""
    attention: Tensor = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)
    return attention if attention.requires_grad else attention.requires_grad_()


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, L, W] -> [B, N, L, W / N]."""
    split: Tensor = x.unflatten(2, (heads, -1))
    return split.transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    """[B, N, L, W / N] -> [B, L, W]."""
    return x.transpose(1, 2).flatten(2)
