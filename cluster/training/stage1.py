"""Stage 1 on many workers: image features once, then only the identities' prompt tokens learn.

    shards ──▶ frozen encoder ──▶ feature bank ──▶ [stage 1] ──▶ tokens, text features ──▶ stage1.safetensors

Stage 2 starts from that file. A step encodes each of the batch's identities once, over all ranks.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from clipreid import stage1 as method
from clipreid.errors import ModelError
from clipreid.model.prompts import PromptedText
from clipreid.model.reid import ReIDModel
from clipreid.optim import parameter_groups, stage1_lr
from clipreid.weights.file import dump_tensors
from clipreid.weights.sealed import check_content
from cluster.errors import ConfigError
from cluster.ranks.team import Team
from cluster.run.run_folder import STAGE1_RESULT
from cluster.run.storage import Storage
from cluster.settings.config import Config
from cluster.training.engine import Engine
from shards.loading.index import SplitIndex


class Stage1:
    """Batches, losses and learning rate of stage 1, as `loop.Loop` asks for them."""

    number = 1

    def __init__(self, config: Config, team: Team, text: PromptedText, bank: np.ndarray, train: SplitIndex):
        settings = config.stage1
        self.config = config
        self.team = team
        self.text = text
        self.bank, self.labels = bank, train.labels
        self.means: Tensor | None = None
        """With `stage1.features: average` [N, D]; then the rows of a batch are identities."""
        if settings.features == "average":
            means = method.identity_means(bank, train.labels, train.num_identities)
            self.means = torch.from_numpy(means).to(team.device)
            self.labels = np.arange(train.num_identities)
        self.label_names = train.label_names
        self.epochs = settings.epochs
        self.global_images = min(settings.batch, len(self.labels))
        groups = parameter_groups(text.named_parameters(), settings.weight_decay)
        self.engine = Engine(text, groups, team=team, zero_stage=config.train.zero_stage)

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
        device = self.team.device
        if self.means is not None:
            return method.average_step(self._encode, self.means, torch.tensor(rows, device=device), self.team)
        own = rows[method.rank_slice(len(rows), self.team.rank, self.team.world_size)]
        images = torch.tensor(self.bank[own], device=device)
        labels = torch.tensor(self.labels[own], device=device)
        batch_labels = torch.tensor(self.labels[rows])
        return method.step(self._encode, images, labels, batch_labels, self.team)

    def _encode(self, labels: Tensor) -> Tensor:
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            return self.engine(labels)

    def close(self) -> None:
        self.engine.close()

    def identities(self, rows: np.ndarray) -> list[str]:
        return [self.label_names[label] for label in np.unique(self.labels[rows])]


@dataclass
class Stage1Result:
    """What stage 1 hands to stage 2, and what stage 2 has to have in common with it."""

    tokens: Tensor
    """float32 [N, M, W]."""
    text_features: Tensor
    """float32 [N, D]."""
    label_names: list[str]
    """Source identity of each label 0 … N-1."""
    fingerprint: str
    """Of the dataset."""
    encoder: str
    """Of the image encoder's weights before training, which the tokens were fitted to."""

    def write(self, storage: Storage) -> None:
        """Raises TrainingError where the storage cannot be written."""
        meta = {"label_names": self.label_names, "fingerprint": self.fingerprint, "encoder": self.encoder}
        tensors = {"tokens": self.tokens, "text_features": self.text_features}
        with storage.writing(STAGE1_RESULT):
            storage.write(STAGE1_RESULT, *dump_tensors(tensors, {"stage1": json.dumps(meta)}))

    @classmethod
    def read(cls, content: bytes, source: str) -> "Stage1Result":
        """Raises ModelError where it is no such file, or not as it was written."""
        header = check_content(content, source)
        try:
            tensors, facts = parse_safetensors(content), json.loads(header.metadata["stage1"])
            result = cls(tensors["tokens"], tensors["text_features"], **facts)
            if not len(result.tokens) == len(result.text_features) == len(result.label_names):
                raise ValueError("tokens, text features and names differ in number")
            return result
        except (SafetensorError, LookupError, ValueError, TypeError) as error:
            raise ModelError(
                f"{source}: is no result of stage 1 ({type(error).__name__}: {error}): give the stage1.safetensors of "
                "a run"
            ) from None

    def check_fits(self, source: str, fingerprint: str, encoder: str, prompt_tokens: int) -> None:
        """Raises ConfigError where stage 2 would go on from another dataset, encoder or number of tokens."""
        faults = []
        if self.fingerprint != fingerprint:
            faults.append(f"{source} was learned on dataset {self.fingerprint}, data.shards is {fingerprint}")
        if self.encoder != encoder:
            faults.append(
                f"{source} was learned with image encoder {self.encoder}, this run starts with {encoder}: use the same "
                "model.arch, model.pretrained, model.image_size, model.stride and run.seed"
            )
        if self.tokens.shape[1] != prompt_tokens:
            faults.append(
                f"{source} has {self.tokens.shape[1]} tokens per identity, model.prompt_tokens is {prompt_tokens}"
            )
        if faults:
            raise ConfigError("\n".join(faults))


def encoder_hash(model: ReIDModel) -> str:
    """Identifies the image encoder's weights (SIE, necks and classifiers do not count: stage 1 does not see them)."""
    digest = hashlib.sha256()
    for name, value in sorted(model.image_encoder.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def image_features(model: ReIDModel, images: Tensor) -> Tensor:
    """Stage 1's features: projected, evaluation mode, without side information. float [b, 3, H, W] -> [b, D]."""
    return model.features(images).proj
