"""The image encoders: CLIP's towers, re-wired to give the three features that re-identification learns from.

    augment ──▶ [encoders] ──▶ Features ──▶ necks, classifiers, losses; or descriptor, retrieval

In:  float images [B, 3, H, W], normalised; for a ViT maybe side information, one vector per image.
Out: Features per image: `pre` (before the last stage), `img` (after it) and `proj` (in the space shared with text).

The layers are open_clip's own, adopted under their own names: our parts are the stride, the resized position embedding,
the side information and the points where features are taken. Parameter names below an encoder equal those of OpenAI's
`visual`. Weights are loaded before, at the tower's native size (`clipreid.weights`).

B = images, L = tokens (1 + rows * columns), W = width of the tower, C = channels
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipreid.model.blocks import attend
from clipreid.model.spec import SieTokens

if TYPE_CHECKING:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer


class Features(NamedTuple):
    """The three features of a batch of images, each float [B, *]."""

    pre: Tensor
    """Before the last stage: class token after block n-1 of a ViT (W), spatial mean of a ResNet's layer 3 (16 w)."""
    img: Tensor
    """After it: class token after the last block and `ln_post` (W), spatial mean of layer 4 (32 w)."""
    proj: Tensor
    """The same projected into the space of the text features (embed_dim)."""


class ImageEncoder(nn.Module):
    """Common face of the two kinds of tower."""

    widths: tuple[int, int, int]
    """Of the features (pre, img, proj)."""
    grid: tuple[int, int]
    """(rows, columns) that attention sees: of a ViT's patches, of a ResNet's last map."""

    def forward(self, images: Tensor, sie: Tensor | None = None) -> Features:
        """Float images [B, 3, H, W], and `sie` [B, W] or None (ViT only), to Features."""
        raise NotImplementedError


class ViTEncoder(ImageEncoder):
    """A CLIP vision transformer at any image size and stride, with side information (TransReID's SIE)."""

    def __init__(self, visual: "VisionTransformer", grid: tuple[int, int], stride: int, sie_tokens: SieTokens) -> None:
        """The layers of `visual` are adopted: it must not be used afterwards.

        `grid` is (rows, columns) of patches, `stride` the pixels between them.
        """
        super().__init__()
        self.grid, self.sie_tokens = grid, sie_tokens
        self.conv1 = visual.conv1
        self.conv1.stride = (stride, stride)
        self.class_embedding = visual.class_embedding
        self.positional_embedding = nn.Parameter(resize_positions(visual.positional_embedding.detach(), grid))
        self.ln_pre = visual.ln_pre
        self.transformer = visual.transformer
        self.ln_post = visual.ln_post
        self.proj = visual.proj
        width, projected = self.proj.shape
        self.widths = (width, width, projected)

    def forward(self, images: Tensor, sie: Tensor | None = None) -> Features:
        """Float images [B, 3, H, W] to Features; `sie` [B, W] is added before the position embedding."""
        x_BLW: Tensor = self.ln_pre(self.embed(images, sie))
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x_BLW = block(x_BLW)
        pre = x_BLW[:, 0]
        # Of the last block only the class token is used: the queries and MLP of the others are a fifteenth of a ViT-B's
        # work.
        keys_BLW = last.ln_1(x_BLW)
        img = self.ln_post(attend(last, x_BLW[:, :1], keys_BLW[:, :1], keys_BLW)[:, 0])
        return Features(pre, img, img @ self.proj)

    def embed(self, images: Tensor, sie: Tensor | None = None) -> Tensor:
        """Class token and patches with side information and position, before `ln_pre`. float [B, L, W]."""
        patches: Tensor = self.conv1(images).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        if sie is not None:
            sie = sie.to(patches.dtype).unsqueeze(1)
            class_token = class_token + sie
            if self.sie_tokens == "all":
                patches = patches + sie
        return torch.cat([class_token, patches], dim=1) + self.positional_embedding.to(patches.dtype)


class ResNetEncoder(ImageEncoder):
    """CLIP's ModifiedResNet with stride 1 in the last stage, so that its last map is H/16 x W/16."""

    def __init__(self, visual: "ModifiedResNet", grid: tuple[int, int]) -> None:
        """The layers of `visual` are adopted: it must not be used afterwards. `grid` is (H / 16, W / 16)."""
        super().__init__()
        self.grid = grid
        self.conv1, self.bn1, self.act1 = visual.conv1, visual.bn1, visual.act1
        self.conv2, self.bn2, self.act2 = visual.conv2, visual.bn2, visual.act2
        self.conv3, self.bn3, self.act3 = visual.conv3, visual.bn3, visual.act3
        self.avgpool = visual.avgpool
        self.layer1, self.layer2 = visual.layer1, visual.layer2
        self.layer3, self.layer4 = visual.layer3, visual.layer4
        self.attnpool = visual.attnpool
        # open_clip strides by average pooling before a convolution of stride 1: without the pool the stride is 1.
        self.layer4[0].avgpool = nn.Identity()
        self.layer4[0].downsample[0] = nn.Identity()
        positions = resize_positions(self.attnpool.positional_embedding.detach(), grid)
        self.attnpool.positional_embedding = nn.Parameter(positions)
        width = self.attnpool.c_proj.in_features
        self.widths = (width // 2, width, self.attnpool.c_proj.out_features)

    def forward(self, images: Tensor, sie: Tensor | None = None) -> Features:
        """Float images [B, 3, H, W] to Features. There is no side information for a ResNet: `sie` must be None."""
        assert sie is None, "ModelSpec refuses side information for a ResNet"
        layer3, layer4 = self.maps(images)
        return Features(layer3.mean(dim=(2, 3)), layer4.mean(dim=(2, 3)), self._attention_pool(layer4))

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the last two stages, [B, C, H / 16, W / 16] each."""
        x = self.act1(self.bn1(self.conv1(images)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.act3(self.bn3(self.conv3(x)))
        x = self.layer2(self.layer1(self.avgpool(x)))
        layer3: Tensor = self.layer3(x)
        return layer3, self.layer4(layer3)

    def pool_tokens(self, x_BCHW: Tensor) -> Tensor:
        """What the attention pool attends to, [B, L, C]: the mean over the map, then the map, with position."""
        x_BLC = x_BCHW.flatten(2).transpose(1, 2)
        x_BLC = torch.cat([x_BLC.mean(dim=1, keepdim=True), x_BLC], dim=1)
        positions: Tensor = self.attnpool.positional_embedding
        return x_BLC + positions.to(x_BLC.dtype)

    def _attention_pool(self, x_BCHW: Tensor) -> Tensor:
        """Output of the attention pool at its mean token, [B, embed_dim]: the only query that is used."""
        pool = self.attnpool
        x_LBC = self.pool_tokens(x_BCHW).transpose(0, 1)
        pooled, _ = F.multi_head_attention_forward(
            x_LBC[:1],
            x_LBC,
            x_LBC,
            x_LBC.shape[-1],
            pool.num_heads,
            in_proj_weight=None,
            in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=pool.c_proj.weight,
            out_proj_bias=pool.c_proj.bias,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=pool.q_proj.weight,
            k_proj_weight=pool.k_proj.weight,
            v_proj_weight=pool.v_proj.weight,
        )
        return pooled[0]


def resize_positions(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position embedding [1 + g*g, W] resized to [1 + rows*columns, W]; the class row is kept.

    Bilinear, half-pixel centres, no antialiasing: open_clip's own resizing (bicubic, antialiased) is 5e-2 off.
    """
    class_row, cells = embedding[:1], embedding[1:]
    side = math.isqrt(len(cells))
    assert side * side == len(cells), "towers are built at their native size, which is square"
    if (side, side) == grid:
        return embedding.clone()
    cells = cells.T.reshape(1, -1, side, side)
    cells = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([class_row, cells[0].flatten(1).T])
