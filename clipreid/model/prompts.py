"""The text side: a learnable prompt per identity, encoded by CLIP's frozen text tower.

    tokens of identities ──▶ [prompts] ──▶ text features ──▶ stage 1 (contrastive), stage 2 (cross-entropy)

In:  the learnable tokens of some identities, rows of an `clipreid.identity_table`.
Out: unnormalised text features in the space of the image features' `proj`.

The prompt is "A photo of a X X X X person." (Eq. 2), its X replaced by the identity's tokens. The tower is causal, so
nothing behind the end token can reach the feature taken there: the prompt is cut at it (12 positions instead of 77),
and the 5 positions before the tokens, equal for all prompts, are encoded once. Only the tokens learn; for the tower's
weights no gradient is computed.

n = prompts, M = learnable tokens, P = prefix positions, S = the positions behind it
W = width of the text tower, D = embed_dim
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clipreid.errors import ModelError
from clipreid.model.blocks import attend

if TYPE_CHECKING:
    from open_clip import CLIP
    from open_clip.transformer import ResidualAttentionBlock

PREFIX_POSITIONS = 5
"""Start token and "a photo of a", one vocabulary entry each."""


class PromptLearner(nn.Module):
    """The embedded words around the learnable tokens.

    `token_prefix` [1, 5, W] and `token_suffix` [1, context - 5 - M, W] are the constant part of the template, up to the
    tower's full context.
    """

    token_prefix: Tensor
    token_suffix: Tensor

    def __init__(self, words_LW: Tensor, end: int, tokens: int) -> None:
        """`words_LW`: the embedded template with M placeholders, [context, W]; `end`: its end token's place."""
        super().__init__()
        self.length = end + 1
        words_LW = words_LW.detach()
        self.register_buffer("token_prefix", words_LW[None, :PREFIX_POSITIONS].clone())
        self.register_buffer("token_suffix", words_LW[None, PREFIX_POSITIONS + tokens :].clone())

    def forward(self, tokens_nMW: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded prompts of identities with these tokens, cut behind the end token.

        Returns the prefix that all share, [1, 5, W], and what follows it, [n, S, W], 5 + S = `length`.
        """
        return self.token_prefix, self.uncut(tokens_nMW)[:, PREFIX_POSITIONS : self.length]

    def uncut(self, tokens_nMW: Tensor) -> Tensor:
        """The whole prompts, [n, context, W], which the cut is measured against."""
        prefix, suffix = (words.expand(len(tokens_nMW), -1, -1) for words in (self.token_prefix, self.token_suffix))
        return torch.cat([prefix, tokens_nMW, suffix], dim=1)


class TextEncoder(nn.Module):
    """CLIP's text tower behind the vocabulary: embedded prompts in, features out. Frozen."""

    def __init__(self, clip: "CLIP") -> None:
        """The text layers of `clip` are adopted: it must not be used for text afterwards."""
        super().__init__()
        self.positional_embedding: Tensor = clip.positional_embedding
        self.transformer = clip.transformer
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        self.requires_grad_(False)

    def forward(self, prefix_1PW: Tensor, rest_nSW: Tensor) -> Tensor:
        """Features [n, D] at the last position of n prompts, given as their common prefix and the rest.

        The tower is causal: the prefix does not see the rest, so it is encoded once and serves the n prompts as keys
        and values. At 64 prompts on a CPU that is 1.5 times faster, backward pass included.
        """
        prefix, rest = prefix_1PW.shape[1], rest_nSW.shape[1]
        positions = self.positional_embedding.to(rest_nSW.dtype)
        x_1PW, x_nSW = prefix_1PW + positions[:prefix], rest_nSW + positions[prefix : prefix + rest]
        mask = rest_nSW.new_full((prefix + rest, prefix + rest), float("-inf")).triu_(1)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            queries_nSW, keys = _normed(block, x_1PW, x_nSW)
            x_1PW = block(x_1PW, attn_mask=mask[:prefix, :prefix])
            x_nSW = attend(block, x_nSW, queries_nSW, keys, mask[prefix:])
        queries_nSW, keys = _normed(last, x_1PW, x_nSW)
        end_nW = attend(last, x_nSW[:, -1:], queries_nSW[:, -1:], keys)[:, 0]
        features_nD: Tensor = self.ln_final(end_nW) @ self.text_projection
        return features_nD


def _normed(block: "ResidualAttentionBlock", x_1PW: Tensor, x_nSW: Tensor) -> tuple[Tensor, Tensor]:
    """The rest's queries [n, S, W], and keys for all positions [n, P + S, W]."""
    queries_nSW = block.ln_1(x_nSW)
    prefix_nPW = block.ln_1(x_1PW).expand(len(x_nSW), -1, -1)
    return queries_nSW, torch.cat([prefix_nPW, queries_nSW], dim=1)


class PromptedText(nn.Module):
    """From an identity's tokens to its text feature: what stage 1 trains them through. Nothing in here learns."""

    def __init__(self, prompt_learner: PromptLearner, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.prompt_learner = prompt_learner
        self.text_encoder = text_encoder

    def forward(self, tokens_nMW: Tensor) -> Tensor:
        """Unnormalised text features [n, D] of identities with these tokens."""
        features_nD: Tensor = self.text_encoder(*self.prompt_learner(tokens_nMW))
        return features_nD


def template_ids(noun: str, tokens: int, context: int) -> tuple[list[int], int]:
    """Vocabulary ids of "A photo of a X … X {noun}." with `tokens` placeholders, and the end token's position.

    The ids are padded with zeros to `context`. Raises ModelError when the noun is empty or the prompt too long.
    """
    from clipreid.model.clip_library import open_clip  # seconds to import: not before a model is really built

    if not noun.strip():
        raise ModelError("the noun of the prompt is empty; give the dataset a word such as 'person' (pack.py --noun)")
    tokenizer = open_clip.SimpleTokenizer(context_length=context)
    words = tokenizer.encode(f"A photo of a{' X' * tokens} {noun}.")
    ids = [tokenizer.sot_token_id, *words, tokenizer.eot_token_id]
    if len(ids) > context:
        raise ModelError(
            f"the prompt for noun {noun!r} with model.prompt_tokens {tokens} takes {len(ids)} positions, "
            f"the text tower has {context}: use fewer tokens or a shorter noun"
        )
    return ids + [0] * (context - len(ids)), len(ids) - 1
