"""One step through a block of CLIP's transformers for some of the positions only.

encoders (class token of the last block), prompts (positions behind the prefix) ──▶ [blocks]
"""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from open_clip.transformer import ResidualAttentionBlock


def attend(
    block: "ResidualAttentionBlock", x_BQW: Tensor, queries_BQW: Tensor, keys_BKW: Tensor, mask_QK: Tensor | None = None
) -> Tensor:
    """A pre-norm block of open_clip's, for the Q positions of `x_BQW` among K that serve as keys and values.

    `queries_BQW` are the same positions, and `keys_BKW` all of them, after the block's `ln_1`. `mask_QK` is
    additive. Equals the whole block at those positions; returns [B, Q, W].
    """
    x_BQW = x_BQW + block.ls_1(block.attention(queries_BQW, keys_BKW, keys_BKW, attn_mask=mask_QK))
    stepped: Tensor = x_BQW + block.ls_2(block.mlp(block.ln_2(x_BQW)))
    return stepped
