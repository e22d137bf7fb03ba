"""Stage 2 on many workers: the image encoder learns from PK batches, against the gathered batch and frozen texts.

    shards ──▶ PK loader ──▶ augment ──▶ [stage 2: encoder, losses] ──▶ model.safetensors
                             stage1.safetensors ──▶ text features ┘

Images arrive as uint8; augmentation is done on the device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from clipreid import stage2 as method
from clipreid.augment import AugmentSettings, augment
from clipreid.identity_table import IdentityTable
from clipreid.loss_settings import LossSettings
from clipreid.model.batchnorm import globalize_batchnorm
from clipreid.model.encoders import ResNetEncoder
from clipreid.model.reid import ReIDModel
from clipreid.optim import parameter_groups, stage2_lr
from clipreid.to_device import to_device
from clipreid.weights.initial import Models
from cluster.ranks.arithmetic import compiling_pays, encoder_autocast
from cluster.ranks.team import Team
from cluster.settings.config import AUTO, Config
from cluster.training.engine import Engine, Replicated
from cluster.training.trained_table import TrainedTable
from shards.loading.cache import CacheSettings
from shards.loading.index import ShardIndex
from shards.loading.pk_loader import PKBatch, PKLoader
from shards.loading.pk_sampler import PKSettings


class ToDevice:
    """Copies to a GPU on a stream of their own, beside the step before, which the GPU is still busy with."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        if self.stream is None:
            return [tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self.stream):
            copies = [to_device(tensor, self.device) for tensor in tensors]
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for copy in copies:
            copy.record_stream(computing)  # Its memory is not given away before the step is through with it.
        return copies


class Stage2:
    """Batches, losses and learning rate of stage 2, as `loop.Loop` asks for them."""

    number = 2

    def __init__(
        self,
        config: Config,
        team: Team,
        models: Models,
        text_features: IdentityTable | None,
        index: ShardIndex,
    ):
        """text_features: frozen [N, D], of the two-stage method.

        Raises DataError where the batch does not fit the dataset.
        """
        s = config.stage2
        self.config = config
        self.team = team
        self.text_features = text_features
        self.epochs = s.epochs
        self.global_images = config.batch_images
        self.label_names = index.split("train").label_names
        self.text, self.tables = models.text, models.tables
        self.one_stage = config.method == "one_stage"
        if team.world_size > 1:
            globalize_batchnorm(models.model, team)
        if compiling_pays(team.device) if config.train.compile == AUTO else config.train.compile:
            models.model.image_encoder.compile(dynamic=False)
        self.model = models.model
        self.engine = self._engine(models.model)
        self.loss_settings = loss_settings(config)
        self.augment_settings = augment_settings(config)
        # Convolutions are fastest with a pixel's channels side by side. The weights stay as they are: ZeRO lays them
        # out flat, and checkpoints take them as such.
        resnet = isinstance(models.model.image_encoder, ResNetEncoder)
        self.memory_format = torch.channels_last if resnet else torch.contiguous_format
        self.to_device = ToDevice(team.device)
        self.loader = self._loader(index)

    def _engine(self, model: ReIDModel) -> Engine:
        s, stage1, team = self.config.stage2, self.config.stage1, self.team
        groups = parameter_groups(model.named_parameters(), s.weight_decay, s.bias_lr_factor)
        zero_stage = self.config.train.zero_stage
        replicated = Replicated(model, groups, team=team, zero_stage=zero_stage, prefix="model.")
        tables = [
            TrainedTable(f"model.{classifier.name}", classifier, weight_decay=s.weight_decay)
            for classifier in self.tables.classifiers
        ]
        if self.one_stage:
            assert self.tables.tokens is not None
            name, factor = f"text.{self.tables.tokens.name}", stage1.lr / s.lr
            tables.append(TrainedTable(name, self.tables.tokens, weight_decay=stage1.weight_decay, lr_factor=factor))
        return Engine(replicated=replicated, tables=tables)

    def _loader(self, index: ShardIndex) -> PKLoader:
        data, config, team = self.config.data, self.config, self.team
        return PKLoader(
            index,
            settings=sampler_settings(config),
            image_size=config.model.image_size,
            rank=team.rank,
            world_size=team.world_size,
            num_loaders=data.loaders,
            on_error=data.on_error,
            skip_limit=data.skip_limit,
            cache=CacheSettings(data.cache_dir, int(data.cache_gb * 1e9)),
            pin_memory=team.device.type == "cuda",
        )

    def lr(self, epoch: int) -> float:
        s = self.config.stage2
        return stage2_lr(epoch, s.lr, s.milestones, s.warmup_epochs, s.warmup_factor, s.gamma)

    def num_steps(self, epoch: int) -> int:
        return self.loader.steps_per_epoch(epoch)

    def batches(self, epoch: int, first_step: int) -> Iterator[PKBatch]:
        self.model.train()
        return self.loader.epoch(epoch, first_step)

    def losses(self, batch: PKBatch) -> dict[str, Tensor]:
        images, labels, cameras, views, positions = self.to_device(
            batch.images, batch.labels, batch.cameras, batch.views, batch.positions
        )
        config, settings = self.config, self.augment_settings
        images = augment(
            images, positions, seed=config.run.seed, epoch=batch.epoch, epoch_step=batch.epoch_step, settings=settings
        )
        images = images.contiguous(memory_format=self.memory_format)
        with encoder_autocast(config.train, images.device):
            output = self.engine(images, cameras, views, config.train.micro_batch)
            own_texts = self._own_texts(batch)
        return method.losses(
            output,
            labels,
            self.tables.classifiers,
            self.loss_settings,
            self.team,
            text_features=self.text_features,
            own_texts=own_texts,
        )

    def _own_texts(self, batch: PKBatch) -> Tensor | None:
        """Text features of this rank's images [b, D], where a loss needs those of the batch alone."""
        per = self.config.stage2.images_per_identity
        if self.one_stage:
            assert self.text is not None and self.tables.tokens is not None
            return method.batch_texts(self.text, self.tables.tokens, batch.identities, per, self.team)
        if {"i2t", "t2i"}.isdisjoint(self.loss_settings.text_loss.split("+")):
            return None
        assert self.text_features is not None
        wanted = batch.identities.tensor_split(self.team.world_size)
        return self.text_features.fetch(wanted, self.team).repeat_interleave(per, dim=0)

    def identities(self, batch: PKBatch) -> list[str]:
        return [self.label_names[label] for label in batch.labels.unique().tolist()]

    def close(self) -> None:
        self.loader.close()
        self.engine.close()


def loss_settings(config: Config) -> LossSettings:
    s = config.stage2
    return LossSettings(
        id_weight=s.id_weight,
        triplet_weight=s.triplet_weight,
        text_weight=s.text_weight,
        label_smoothing=s.label_smoothing,
        margin=s.margin,
        triplet_levels=s.triplet_levels,
        text_loss="i2t+t2i" if config.method == "one_stage" else s.text_loss,
    )


def sampler_settings(config: Config) -> PKSettings:
    return PKSettings(
        identities=config.stage2.identities,
        images_per_identity=config.stage2.images_per_identity,
        seed=config.run.seed,
        strategy=config.data.sampler,
        balance_alpha=config.data.balance_alpha,
        virtual_nodes=config.data.virtual_nodes if config.data.locality == "node" else 0,
    )


def augment_settings(config: Config) -> AugmentSettings:
    a = config.augment
    return AugmentSettings(
        flip=a.flip, pad=a.pad, erase=a.erase, mean=config.data.pixel_mean, std=config.data.pixel_std
    )
