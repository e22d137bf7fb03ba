"""Where in an image a feature comes from: relevance maps (Chefer, Gur, Wolf 2021), Figure 3 of the paper.

    images, their identities' text features ──▶ [relevance] ──▶ a weight for every patch

The encoders' forward pass is repeated with attention written out, since the fused one does not give the weights
that the gradient is taken of.

B = images, L = tokens (1 + rows * columns), D = width of the text features, N = heads
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from clipreid.model.encoders import ImageEncoder, ResNetEncoder, ViTEncoder


def relevance_maps(encoder: ImageEncoder, images: Tensor, targets: Tensor) -> Tensor:
    """How much each patch speaks for the target: float [B, rows, columns], from 0 to 1 in every image.

    images: float [B, 3, H, W], normalised. targets: float [B, D], the features that an image's projected feature
    is compared with by cosine. Patches are a ViT's, or the places of a ResNet's last map. No side information is
    used, as in stage 1.

    Eq. 5 and 6 of Chefer, Gur, Wolf ("Generic Attention-model Explainability", ICCV 2021): a layer's relevance is
    the mean over heads of the positive part of gradient x attention, layers multiply, and the row of the class token
    is read. A ResNet has one layer of attention, its pool.
    """
    with torch.enable_grad():
        feature, attentions = _attended(encoder, images)
        score = F.cosine_similarity(feature, targets).sum()
        gradients = torch.autograd.grad(score, attentions)
    row_BL = attentions[-1].new_zeros(len(images), attentions[-1].shape[-1])
    row_BL[:, 0] = 1
    for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
        relevance_BQL = (gradient * attention).clamp(min=0).mean(1).detach()
        row_BL = row_BL + torch.einsum("bq,bql->bl", row_BL[:, : relevance_BQL.shape[1]], relevance_BQL)
    patches = row_BL[:, 1:]
    low, high = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
    return ((patches - low) / (high - low).clamp(min=torch.finfo(patches.dtype).tiny)).view(-1, *encoder.grid)


def _attended(encoder: ImageEncoder, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The projected feature [B, D], and of every layer the attention [B, N, queries, L] that it was made with."""
    if isinstance(encoder, ViTEncoder):
        return _attended_vit(encoder, images)
    assert isinstance(encoder, ResNetEncoder)
    return _attended_resnet(encoder, images)


def _attended_vit(encoder: ViTEncoder, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    x_BLW: Tensor = encoder.ln_pre(encoder.embed(images))
    attentions = []
    for block in encoder.transformer.resblocks:
        own = block.attn
        weights, biases = own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3)
        normed = block.ln_1(x_BLW)
        queries, keys, values = (F.linear(normed, weight, bias) for weight, bias in zip(weights, biases, strict=True))
        attended, attention = _attend(queries, keys, values, own.num_heads)
        attentions.append(attention)
        x_BLW = x_BLW + block.ls_1(own.out_proj(attended))
        x_BLW = x_BLW + block.ls_2(block.mlp(block.ln_2(x_BLW)))
    return encoder.ln_post(x_BLW[:, 0]) @ encoder.proj, attentions


def _attended_resnet(encoder: ResNetEncoder, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    pool = encoder.attnpool
    _, layer4 = encoder.maps(images)
    x_BLC = encoder.pool_tokens(layer4)
    attended, attention = _attend(pool.q_proj(x_BLC[:, :1]), pool.k_proj(x_BLC), pool.v_proj(x_BLC), pool.num_heads)
    return pool.c_proj(attended)[:, 0], [attention]


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention over heads, [B, *, W] each, and its weights [B, N, queries, keys]."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    attention = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    if not attention.requires_grad:
        attention.requires_grad_()
    return (attention @ v).transpose(1, 2).flatten(2), attention
