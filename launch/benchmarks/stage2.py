"""Speed and memory of a stage 2 step, against a plain loop, and against the device's own matrix products.

Ours: decoded uint8 images from page-locked memory, copied beside the step before; augmented on the device; bf16
autocast; fused Adam; losses read while the backward pass runs; eager, or with the encoder compiled. Plain:
float images, augmented beforehand at no cost, from ordinary memory; fp16 autocast with GradScaler (on a CPU bf16
without); unfused Adam; every loss part read by `.item()`. Both train the same model with the same losses, on one
device, without Ray, DeepSpeed or a dataset.
"""

import argparse
import copy
import itertools
import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipreid import stage2
from clipreid.augment import augment, normalise
from clipreid.identity_table import IdentityTable, IdentityTables
from clipreid.model.encoders import ResNetEncoder
from clipreid.model.reid import ReIDModel
from clipreid.optim import adam, parameter_groups
from clipreid.weights.initial import build_models
from launch.benchmarks._published import AUGMENT, LOSSES, model_spec
from launch.benchmarks._timing import choose_device, machine_facts, peak_memory_bytes, seconds
from launch.cli import Parser, positive

EXAMPLE = """examples:
  python launch/bench.py stage2                                        all cases on a GPU, a small one on a CPU
  python launch/bench.py stage2 --cases rn50:256x128 --batch 64 --modes eager
  python launch/bench.py stage2 --device cpu --cases tiny:64x64 --batch 16 --steps 3

The aim on a GPU: 3 times the plain loop at batch 64, half of the measured peak at batch 256. Without a GPU the figures
say nothing about either, and the result says so."""
ARCHS = {"vit": "ViT-B-16-quickgelu", "rn50": "RN50-quickgelu", "tiny": "configs/models/small_vit.json"}
IDENTITIES = 751
LR, WEIGHT_DECAY = 5e-6, 1e-4
IMAGES_PER_IDENTITY = 4
ON_GPU = {"cases": ["vit:256x128", "vit:256x256", "rn50:256x128"], "batch": [64, 256], "steps": 20}
ON_CPU = {"cases": ["tiny:64x64"], "batch": [16], "steps": 3}
MODES = ("eager", "compiled")


def run(arguments: list[str]) -> dict[str, Any]:
    options = _options(arguments)
    device = choose_device(options.device)
    for key, value in (ON_GPU if device.type == "cuda" else ON_CPU).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    peak = matmul_peak(device, dtype)
    rows = []
    for case, batch in itertools.product(options.cases, options.batch):
        rows += _case(case, batch, options, device, peak)
    note = {} if device.type == "cuda" else {"note": "no GPU: these figures say nothing about the aims for one"}
    return {
        "bench": "stage2",
        **machine_facts(device),
        **note,
        "precision": options.precision,
        "steps": options.steps,
        "matmul_peak_tflops": _rounded(peak / 1e12),
        "rows": rows,
    }


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py stage2", description=__doc__, epilog=EXAMPLE)
    parser.add_argument(
        "--cases", nargs="+", metavar="MODEL:HxW", help="models vit, rn50, tiny or a JSON file, and size"
    )
    parser.add_argument(
        "--batch", nargs="+", type=positive, help=f"images, multiples of {IMAGES_PER_IDENTITY}, at least 8"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    parser.add_argument(
        "--precision", choices=["bf16", "float32"], default="bf16", help="float32: of the plain loop too"
    )
    parser.add_argument("--steps", type=positive, help="steps timed at a stretch; the median of 3 stretches counts")
    parser.add_argument("--device", help="default: cuda where there is one")
    options = parser.parse_args(arguments)
    for batch in options.batch or ():
        if batch < 2 * IMAGES_PER_IDENTITY or batch % IMAGES_PER_IDENTITY:
            parser.error(f"--batch {batch} is not a multiple of {IMAGES_PER_IDENTITY}, at least two identities")
    for case in options.cases or ():
        if ":" not in case or not all(part.isdigit() for part in case.rsplit(":", 1)[1].split("x")):
            parser.error(f"--cases {case} is not MODEL:HxW, for example vit:256x128")
    return options


def _case(
    case: str, batch: int, options: argparse.Namespace, device: torch.device, peak: float
) -> list[dict[str, Any]]:
    """Rows of one model, image size and batch: plain first, then ours in each mode."""
    name, _, size = case.rpartition(":")
    height, width = map(int, size.split("x"))
    arch = ARCHS.get(name, name)
    model, _, tables = build_models(model_spec(arch, (height, width), IDENTITIES))
    flops = training_flops(model, tables, (batch, 3, height, width))
    rows, plain = [], None
    for mode in ("plain", *options.modes):
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        kind = PlainLoop if mode == "plain" else OurLoop
        loop = kind(model, tables, (batch, 3, height, width), device, amp=options.precision == "bf16")
        if mode == "compiled":
            loop.model.image_encoder.compile(dynamic=False)
        images_per_s = batch / _step_seconds(loop, options.steps, device)
        plain = plain or images_per_s
        speed = flops / batch * images_per_s
        rows.append(
            {
                "model": name,
                "image_size": [height, width],
                "batch": batch,
                "mode": mode,
                "images_per_s": _rounded(images_per_s),
                "model_tflops": _rounded(speed / 1e12),
                "share_of_peak": _rounded(speed / peak),
                "peak_memory_bytes": peak_memory_bytes(device),
                "times_plain": _rounded(images_per_s / plain),
            }
        )
        del loop
    return rows


def _step_seconds(loop: "OurLoop", steps: int, device: torch.device) -> float:
    """Time of a step in a stretch of them, warm."""

    def stretch():
        for _ in range(steps):
            loop.step()

    seconds(lambda: [loop.step() for _ in range(3)], device)
    return statistics.median(seconds(stretch, device) for _ in range(3)) / steps


class OurLoop:
    """A stage 2 step as `cluster.training` takes it on one worker, on batches made up beforehand."""

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
        named = [*self.model.named_parameters(), *((table.name, table.block) for table in self.classifiers)]
        self.groups = parameter_groups(named, WEIGHT_DECAY, bias_lr_factor=2.0)
        for group in self.groups:
            group["lr"] = LR * group["lr_factor"]
        self.steps = 0
        self.prepare()

    def prepare(self) -> None:
        self.optimizer = adam(self.groups)
        if self.device.type == "cuda":
            self.images, self.labels, self.positions = (
                tensor.pin_memory() for tensor in (self.images, self.labels, self.positions)
            )
            self.copies = torch.cuda.Stream(self.device)
            self.read = torch.cuda.Event()

    def step(self) -> dict[str, float]:
        """One optimizer step; the loss parts."""
        self.steps += 1
        images, labels, positions = self._to_device(self.images, self.labels, self.positions)
        images = augment(images, positions, seed=0, epoch=1, epoch_step=self.steps, settings=AUGMENT)
        parts = self.losses(images.contiguous(memory_format=self.memory_format), labels)
        news = torch.stack([part.detach() for part in parts.values()])
        if self.device.type == "cuda":
            news = torch.empty(news.shape, pin_memory=True).copy_(news, non_blocking=True)
            self.read.record()
        parts["loss"].backward()
        if self.device.type == "cuda":
            self.read.synchronize()  # The GPU has the backward pass to do meanwhile.
        values = dict(zip(parts, news.tolist(), strict=True))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return values

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.amp):
            output = self.model(images)
        return stage2.losses(output, labels, self.classifiers, LOSSES, text_features=self.texts)

    def _to_device(self, *tensors: Tensor) -> list[Tensor]:
        if self.device.type != "cuda":
            return list(tensors)
        with torch.cuda.stream(self.copies):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.copies)
        for tensor in copies:
            tensor.record_stream(computing)
        return copies


class PlainLoop(OurLoop):
    """The same model and losses in a loop written the usual way."""

    def prepare(self) -> None:
        self.optimizer = torch.optim.Adam(self.groups)
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


def training_flops(model: ReIDModel, tables: IdentityTables, shape: tuple[int, ...]) -> int:
    """Floating-point operations of one step's products and convolutions, forward and backward, (B, 3, H, W).

    Counted operation by operation, on tensors without data. Attention runs unfused for it, so that its products are
    seen; what the model does not compute (queries of the last block that nothing reads) is not counted either.
    """
    counted = copy.deepcopy(model).to("meta").train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        features = counted.image_encoder(torch.empty(shape, device="meta"))
        rows = [torch.empty_like(table.block, device="meta", requires_grad=True) for table in tables.classifiers]
        scores = [value @ own.T for value, own in zip(features[1:], rows, strict=True)]
        sum(value.sum() for value in (*features, *scores)).backward()
    return counter.get_total_flops()


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of a few large square matrix products: what the device can do."""
    n, products = (8192, 20) if device.type == "cuda" else (1024, 3)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def multiply():
        for _ in range(products):
            a @ b

    return products * 2 * n**3 / min(seconds(multiply, device) for _ in range(5))


def _rounded(value: float) -> float:
    """Four digits are more than a timing is good for."""
    return float(f"{value:.4g}")
