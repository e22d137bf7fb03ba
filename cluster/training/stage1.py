"""Stage 1 on many workers: image features once, then only the identities' prompt tokens learn.

    shards ──▶ frozen encoder ──▶ feature bank ──▶ [stage 1] ──▶ tokens ──▶ text features ──▶ stage1_result.py

A step encodes each of the batch's identities once, over all ranks.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from clipreid import stage1 as method
from clipreid.identity_table import IdentityTable
from clipreid.model.prompts import PromptedText
from clipreid.model.reid import ReIDModel
from clipreid.optim import stage1_lr
from clipreid.to_device import to_device
from cluster.ranks.arithmetic import encoder_autocast
from cluster.ranks.team import Team
from cluster.settings.config import Config
from cluster.training.engine import Engine
from cluster.training.trained_table import TrainedTable
from shards.loading.index import SplitIndex


class Stage1:
    """Batches, losses and learning rate of stage 1, as `loop.Loop` asks for them."""

    number = 1

    def __init__(
        self,
        config: Config,
        team: Team,
        text: PromptedText,
        tokens: IdentityTable,
        bank: np.ndarray,
        train: SplitIndex,
    ):
        """bank: [n, D], the image feature of every row of `train`."""
        settings = config.stage1
        self.config, self.team = config, team
        self.text, self.tokens = text, tokens
        self.bank, self.labels = bank, train.labels
        self.means: IdentityTable | None = None
        """With `stage1.features: average`; then the rows of a batch are identities."""
        if settings.features == "average":
            self.means = method.identity_means(bank, train.labels, train.num_identities, team, team.device)
            self.labels = np.arange(train.num_identities)
        self.label_names = train.label_names
        self.epochs = settings.epochs
        self.global_images = min(settings.batch, len(self.labels))
        learning = TrainedTable(tokens.name, tokens, weight_decay=settings.weight_decay)
        self.engine = Engine(tables=[learning])

    def lr(self, epoch: int) -> float:
        s = self.config.stage1
        return stage1_lr(epoch, s.epochs, s.lr, s.warmup_epochs, s.warmup_lr, s.min_lr)

    def num_steps(self, epoch: int) -> int:
        return -(-len(self.labels) // self.config.stage1.batch)

    def batches(self, epoch: int, first_step: int) -> Iterator[np.ndarray]:
        """Row numbers of the global batch, the same on every rank."""
        plan = method.batches(len(self.labels), self.config.stage1.batch, self.config.run.seed, epoch)
        yield from plan[first_step - 1 :]

    def losses(self, rows: np.ndarray) -> dict[str, Tensor]:
        batch_labels = torch.tensor(self.labels[rows])
        if self.means is not None:
            return method.average_step(self._encode, self.tokens, self.means, batch_labels, self.team)
        images = to_device(torch.tensor(self.bank[rows]), self.team.device)
        return method.step(self._encode, self.tokens, images, batch_labels, self.team)

    def _encode(self, tokens: Tensor) -> Tensor:
        with encoder_autocast(self.config.train, tokens.device):
            return self.text(tokens)

    def close(self) -> None:
        self.engine.close()

    def identities(self, rows: np.ndarray) -> list[str]:
        return [self.label_names[label] for label in np.unique(self.labels[rows])]


def encoder_hash(model: ReIDModel) -> str:
    """Identifies the image encoder's weights (SIE, necks and classifiers do not count: stage 1 does not see them)."""
    digest = hashlib.sha256()
    for name, value in sorted(model.image_encoder.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def image_features(model: ReIDModel, images: Tensor) -> Tensor:
    """Stage 1's features: projected, evaluation mode, without side information. float [b, 3, H, W] -> [b, D]."""
    return model.features(images).proj
