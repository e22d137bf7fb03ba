"""What stage 2's losses can be varied by; no torch, so that a run's settings can name the variants.

settings ──▶ [loss_settings] ──▶ stage2.losses
"""

from dataclasses import dataclass
from typing import Literal

TextLoss = Literal["none", "i2t", "i2t+t2i", "i2tce", "i2tce+t2i"]
"""Image-to-text losses (Table 6): contrastive in one direction or both, or cross-entropy over all identities."""


@dataclass(frozen=True)
class LossSettings:
    """Eq. 9 and its variants (Tables 4, 5, 6, 9)."""

    id_weight: float
    triplet_weight: float
    text_weight: float
    label_smoothing: float
    """Of the ID losses and of i2tce."""
    margin: float
    """Of the triplet loss, a Euclidean distance."""
    text_loss: TextLoss
    triplet_levels: Literal[2, 3]
    """3: pre, img, proj; 2: without pre."""
