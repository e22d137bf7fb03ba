"""Steps of stage 2 on one device, without a dataset or a run: ours, and the usual way to write them.

    images, or batches of a loader ──▶ [loops] ──▶ loss parts

Ours: decoded uint8 images from page-locked memory, copied beside the step before; augmented on the device; bf16
autocast; fused Adam; losses read while the backward pass runs. Usual: float images, augmented beforehand at no cost,
from ordinary memory; fp16 autocast with GradScaler (on a CPU bf16 without); unfused Adam; every part read by `.item()`.

B = images of a batch
"""

import copy
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipreid import stage2
from clipreid.augment import augment, normalise
from clipreid.identity_table import IdentityTable, IdentityTables
from clipreid.model.encoders import Features, ResNetEncoder
from clipreid.model.reid import ReIDModel, ReIDOutput
from clipreid.optim import adam, parameter_groups
from launch.measure.published import AUGMENT, LOSSES

if TYPE_CHECKING:
    from cluster.ranks.team import Team

IDENTITIES = 751
LR, WEIGHT_DECAY = 5e-6, 1e-4
IMAGES_PER_IDENTITY = 4
WARM_UP = 3
"""Steps before a capture."""


class OurLoop:
    """A stage 2 step as `cluster.training` takes it on one worker, on a batch made up beforehand or a loader's."""

    def __init__(
        self, model: ReIDModel, tables: IdentityTables, shape: tuple[int, ...], device: torch.device, amp: bool
    ):
        """shape: (B, 3, H, W)."""
        self.device, self.amp, self.dtype = device, amp, torch.bfloat16
        self.model = copy.deepcopy(model).to(device).train()
        resnet = isinstance(model.image_encoder, ResNetEncoder)
        self.memory_format = torch.channels_last if resnet else torch.contiguous_format
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.labels = torch.arange(shape[0]) // IMAGES_PER_IDENTITY
        self.positions = torch.arange(shape[0])
        texts = torch.randn(IDENTITIES, model.image_encoder.widths[2], generator=generator)
        self.texts = IdentityTable.frozen("texts", IDENTITIES, texts.to(device))
        self.classifiers = copy.deepcopy(tables).to(device).classifiers
        self.steps = 0
        self.prepare()

    def prepare(self) -> None:
        self.optimizer = adam(self.groups())
        if self.device.type == "cuda":
            self.images, self.labels, self.positions = (
                tensor.pin_memory() for tensor in (self.images, self.labels, self.positions)
            )
            self.copies = torch.cuda.Stream(self.device)
            self.read = torch.cuda.Event()

    def groups(self) -> list[dict[str, Any]]:
        named = [*self.model.named_parameters(), *((table.name, table.block) for table in self.classifiers)]
        groups = parameter_groups(named, WEIGHT_DECAY, bias_lr_factor=2.0)
        for group in groups:
            group["lr"] = LR * group["lr_factor"]
        return groups

    def step(self) -> dict[str, float]:
        """One optimizer step on the images made up beforehand; the loss parts."""
        return self.take(self.images, self.labels, self.positions)

    def take(self, images: Tensor, labels: Tensor, positions: Tensor) -> dict[str, float]:
        """One optimizer step on a batch from the host: uint8 [B, 3, H, W], int64 [B], int64 [B]."""
        self.steps += 1
        images, labels, positions = self._to_device(images, labels, positions)
        images = augment(images, positions, seed=0, epoch=1, epoch_step=self.steps, settings=AUGMENT)
        parts = self.losses(images.contiguous(memory_format=self.memory_format), labels)
        news = torch.stack([part.detach() for part in parts.values()])
        if self.device.type == "cuda":
            news = torch.empty(news.shape, pin_memory=True).copy_(news, non_blocking=True)
            self.read.record()
        self.backward(parts["loss"])
        if self.device.type == "cuda":
            self.read.synchronize()  # The GPU has the backward pass to do meanwhile.
        values = dict(zip(parts, news.tolist(), strict=True))
        self.update()
        return values

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.amp):
            output = self.forward(images)
        return stage2.losses(output, labels, self.classifiers, LOSSES, text_features=self.texts)

    def forward(self, images: Tensor) -> ReIDOutput:
        return self.model(images)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _to_device(self, *tensors: Tensor) -> Sequence[Tensor]:
        if self.device.type != "cuda":
            return tensors
        with torch.cuda.stream(self.copies):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.copies)
        for tensor in copies:
            tensor.record_stream(computing)
        return copies


class CompiledLoop(OurLoop):
    """With the encoder compiled, as `train.compile` has it."""

    def prepare(self) -> None:
        super().prepare()
        torch._dynamo.reset()
        self.model.image_encoder.compile(dynamic=False)


class GraphLoop(OurLoop):
    """With the encoder's kernels, forward and backward, queued as two CUDA graphs."""

    def prepare(self) -> None:
        super().prepare()
        sample = self.images.to(self.device).float().contiguous(memory_format=self.memory_format)
        # The casts of the weights are part of the graph, so they are not kept from one forward pass to the next.
        with torch.autocast(self.device.type, self.dtype, enabled=self.amp, cache_enabled=False):
            graphed = torch.cuda.make_graphed_callables(
                self.model.image_encoder, (sample,), num_warmup_iters=WARM_UP, allow_unused_input=True
            )
        self.model.image_encoder = _WithoutSideInformation(graphed)  # type: ignore[assignment]


class _WithoutSideInformation(nn.Module):
    """A graph takes the images alone."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, side_information: None = None) -> Features:
        return Features(*self.encoder(images))


class EngineLoop(OurLoop):
    """Under the engine of a real run, with DeepSpeed and ZeRO 1."""

    def prepare(self) -> None:
        super().prepare()
        from cluster.training.engine import Engine, Replicated
        from cluster.training.trained_table import TrainedTable

        groups = parameter_groups(self.model.named_parameters(), WEIGHT_DECAY, bias_lr_factor=2.0)
        self.engine = Engine(
            replicated=Replicated(self.model, groups, team=_alone(), zero_stage=1),
            tables=[TrainedTable(table.name, table, weight_decay=WEIGHT_DECAY) for table in self.classifiers],
        )
        self.engine.set_lr(LR)

    def forward(self, images: Tensor) -> ReIDOutput:
        return self.engine(images)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def update(self) -> None:
        self.engine.step()

    @staticmethod
    def usable() -> bool:
        return importlib.util.find_spec("deepspeed") is not None


@cache
def _alone() -> "Team":
    from cluster.ranks.process import join_process_group

    return join_process_group(timeout_s=600)


class PlainLoop(OurLoop):
    """The same model and losses in a loop written the usual way."""

    def prepare(self) -> None:
        self.optimizer = torch.optim.Adam(self.groups())
        self.images = normalise(self.images, AUGMENT.mean, AUGMENT.std)
        half = self.device.type == "cuda"
        self.dtype = torch.float16 if half else torch.bfloat16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half and self.amp)

    def step(self) -> dict[str, float]:
        parts = self.losses(self.images.to(self.device), self.labels.to(self.device))
        self.optimizer.zero_grad()
        self.scaler.scale(parts["loss"]).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {name: part.item() for name, part in parts.items()}


LOOPS: dict[str, type[OurLoop]] = {
    "plain": PlainLoop,
    "eager": OurLoop,
    "graphs": GraphLoop,
    "compiled": CompiledLoop,
    "engine": EngineLoop,
}
"""By the name of their mode."""
