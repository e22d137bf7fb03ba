"""The text side: a learnable prompt per identity, encoded by CLIP's frozen text tower.

    labels -> [prompts] -> text features -> stage 1 (contrastive) and stage 2 (image-to-text cross-entropy)

In:  labels, dense 0-based training identities.
Out: unnormalised text features in the space of the image features' `proj`.

The prompt is "A photo of a X X X X person." (Eq. 2), its X replaced by the identity's tokens. The tower is
causal, so nothing behind the end token can reach the feature taken there: the prompt is cut at it (12
positions instead of 77). Only the tokens learn; for the tower's weights no gradient is computed (contract
C6).
"""

import torch
from torch import Tensor, nn

from clipreid.errors import ModelError

# n = prompts, N = identities, M = learnable tokens, L = positions, W = width of the text tower, D = embed_dim

PREFIX_POSITIONS = 5
"""Start token and "a photo of a", one vocabulary entry each."""


class PromptLearner(nn.Module):
    """The learnable tokens of every identity, and the embedded words around them.

    `tokens` [N, M, W]; `token_prefix` [1, 5, W] and `token_suffix` [1, context - 5 - M, W] are the constant
    rest of the template, up to the tower's full context.
    """

    def __init__(self, words_LW: Tensor, end: int, identities: int, tokens: int) -> None:
        """`words_LW`: the embedded template with M placeholders, [context, W]; `end`: position of its end
        token."""
        super().__init__()
        self.length = end + 1
        self.tokens = nn.Parameter(words_LW.new_empty(identities, tokens, words_LW.shape[1]))
        nn.init.normal_(self.tokens, std=0.02)
        words_LW = words_LW.detach()
        self.register_buffer("token_prefix", words_LW[None, :PREFIX_POSITIONS].clone())
        self.register_buffer("token_suffix", words_LW[None, PREFIX_POSITIONS + tokens :].clone())

    def forward(self, labels: Tensor, length: int | None = None) -> Tensor:
        """Prompts of the identities `labels` int64 [n], embedded: [n, length, W].

        `length` defaults to the prompt cut behind its end token; up to the full context may be asked for.
        """
        length = self.length if length is None else length
        suffix = self.token_suffix[:, : length - PREFIX_POSITIONS - self.tokens.shape[1]]
        n = len(labels)
        return torch.cat(
            [self.token_prefix.expand(n, -1, -1), self.tokens[labels], suffix.expand(n, -1, -1)], dim=1
        )


class TextEncoder(nn.Module):
    """CLIP's text tower behind the vocabulary: embedded prompts in, features out. Frozen."""

    def __init__(self, clip: nn.Module) -> None:
        """`clip` is an open_clip CLIP, whose text layers are adopted (it must not be used for text
        afterwards)."""
        super().__init__()
        self.positional_embedding = clip.positional_embedding
        self.transformer = clip.transformer
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        self.requires_grad_(False)

    def forward(self, prompts: Tensor, end: int) -> Tensor:
        """Embedded prompts [n, L, W], L up to the tower's context, to features [n, D] at position `end` <
        L."""
        length = prompts.shape[1]
        x_nLW = prompts + self.positional_embedding[:length].to(prompts.dtype)
        mask_LL = prompts.new_full((length, length), float("-inf")).triu_(1)
        x_nLW = self.transformer(x_nLW, attn_mask=mask_LL)
        return self.ln_final(x_nLW[:, end]) @ self.text_projection


class PromptedText(nn.Module):
    """Text features of identities: what stage 1 trains, and what stage 2 classifies against."""

    def __init__(self, prompt_learner: PromptLearner, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.prompt_learner = prompt_learner
        self.text_encoder = text_encoder

    @property
    def tokens(self) -> nn.Parameter:
        """The learnable tokens, [N, M, W]: the only parameter that trains."""
        return self.prompt_learner.tokens

    def forward(self, labels: Tensor) -> Tensor:
        """Unnormalised text features [n, D] of the identities `labels`, int64 [n]. Repeated labels are
        encoded repeatedly: the caller makes them distinct."""
        prompts = self.prompt_learner(labels)
        return self.text_encoder(prompts, end=prompts.shape[1] - 1)


def template_ids(noun: str, tokens: int, context: int) -> tuple[list[int], int]:
    """Vocabulary ids of "A photo of a X … X {noun}." with `tokens` placeholders, and the end token's
    position.

    The ids are padded with zeros to `context`. Raises ModelError for an empty noun and for a prompt that is
    too long.
    """
    from open_clip import SimpleTokenizer  # seconds to import: not before a model is really built

    if not noun.strip():
        raise ModelError(
            "the noun of the prompt is empty; give the dataset a word such as 'person' (pack.py --noun)"
        )
    tokenizer = SimpleTokenizer(context_length=context)
    words = tokenizer.encode(f"A photo of a{' X' * tokens} {noun}.")
    ids = [tokenizer.sot_token_id, *words, tokenizer.eot_token_id]
    if len(ids) > context:
        raise ModelError(
            f"the prompt for noun {noun!r} with model.prompt_tokens {tokens} takes {len(ids)} positions, "
            f"the text tower has {context}: use fewer tokens or a shorter noun"
        )
    return ids + [0] * (context - len(ids)), len(ids) - 1
