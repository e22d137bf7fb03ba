"""Speed and memory of a stage 2 step, against a plain loop, and against the device's own matrix products.

The loops: `launch/measure/loops.py`. Ours: uint8 images from page-locked memory, augmented on the device, bf16, fused
Adam, losses read behind the step; eager, its encoder's kernels queued as CUDA graphs, compiled, or under the engine of
a run (where DeepSpeed is there). Plain: the usual way to write it, on float images at hand. All train the same model
with the same losses, on one device, without Ray or a dataset.
"""

import argparse
import copy
import gc
import itertools
import statistics
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipreid.identity_table import IdentityTables
from clipreid.model.reid import ReIDModel
from clipreid.weights.initial import Models, build_models
from launch.cli import Parser, local_place, positive
from launch.measure.kernels import top_kernels
from launch.measure.loops import IDENTITIES, IMAGES_PER_IDENTITY, LOOPS, EngineLoop, OurLoop
from launch.measure.published import model_spec
from launch.measure.timing import choose_device, machine_facts, peak_memory_bytes, seconds
from shards.storage import write_json

EXAMPLE = """examples:
  python launch/bench.py stage2                                        all cases on a GPU, a small one on a CPU
  python launch/bench.py stage2 --cases rn50:256x128 --batch 64 --modes eager
  python launch/bench.py stage2 --cases vit:256x128 --batch 64 --modes eager --kernels 15
  python launch/bench.py stage2 --device cpu --cases tiny:64x64 --batch 16 --steps 3

The aim on a GPU: 3 times the plain loop at batch 64, half of the measured peak at batch 256. Without a GPU the figures
say nothing about either, and the result says so."""
ARCHS = {"vit": "ViT-B-16-quickgelu", "rn50": "RN50-quickgelu", "tiny": "configs/models/small_vit.json"}
ON_GPU = {
    "cases": ["vit:256x128", "vit:256x256", "rn50:256x128"],
    "batch": [64, 256],
    "steps": 20,
    "modes": ["eager", "graphs", "compiled"],
}
ON_CPU = {"cases": ["tiny:64x64"], "batch": [16], "steps": 3, "modes": ["eager", "compiled"]}
MODES = tuple(mode for mode in LOOPS if mode != "plain")


def run(arguments: list[str]) -> dict[str, Any]:
    options = _options(arguments)
    device = choose_device(options.device)
    for key, value in (ON_GPU if device.type == "cuda" else ON_CPU).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    peak = matmul_peak(device, dtype)
    note = {} if device.type == "cuda" else {"note": "no GPU: these figures say nothing about the aims for one"}
    rows: list[dict[str, Any]] = []
    result = {
        "bench": "stage2",
        **machine_facts(device),
        **note,
        "precision": options.precision,
        "steps": options.steps,
        "matmul_peak_tflops": _rounded(peak / 1e12),
        "rows": rows,
    }
    for case, batch in itertools.product(options.cases, options.batch):
        measured = Case(case, batch, options, device, peak)
        for mode in ("plain", *options.modes):
            rows.append(measured.row(mode))
            if options.out:
                write_json(str(options.out), result)
    return result


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py stage2", description=__doc__, epilog=EXAMPLE)
    parser.add_argument(
        "--cases", nargs="+", metavar="MODEL:HxW", help="models vit, rn50, tiny or a JSON file, and size"
    )
    parser.add_argument(
        "--batch", nargs="+", type=positive, help=f"images, multiples of {IMAGES_PER_IDENTITY}, at least 8"
    )
    usable = [mode for mode in MODES if mode != "engine" or EngineLoop.usable()]
    parser.add_argument(
        "--modes", nargs="+", choices=usable, help="default: eager, compiled, and on a GPU graphs; engine: DeepSpeed's"
    )
    parser.add_argument(
        "--precision", choices=["bf16", "float32"], default="bf16", help="float32: of the plain loop too"
    )
    parser.add_argument("--steps", type=positive, help="steps timed at a stretch; the median of 3 stretches counts")
    parser.add_argument("--kernels", type=positive, metavar="N", help="also the N kernels that take most time")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--out", type=local_place, metavar="FILE", help="the result so far, written with every row")
    options = parser.parse_args(arguments)
    for batch in options.batch or ():
        if batch < 2 * IMAGES_PER_IDENTITY or batch % IMAGES_PER_IDENTITY:
            parser.error(f"--batch {batch} is not a multiple of {IMAGES_PER_IDENTITY}, at least two identities")
    for case in options.cases or ():
        if ":" not in case or not all(part.isdigit() for part in case.rsplit(":", 1)[1].split("x")):
            parser.error(f"--cases {case} is not MODEL:HxW, for example vit:256x128")
    return options


class Case:
    """One model, image size and batch."""

    def __init__(self, case: str, batch: int, options: argparse.Namespace, device: torch.device, peak: float):
        self.name, _, size = case.rpartition(":")
        self.batch, self.options, self.device, self.peak = batch, options, device, peak
        height, width = map(int, size.split("x"))
        self.shape = (batch, 3, height, width)
        self.model, _, self.tables = _models(ARCHS.get(self.name, self.name), (height, width))
        self.flops = training_flops(self.model, self.tables, self.shape)
        self.plain: float | None = None
        """Images per second of the plain loop."""

    def row(self, mode: str) -> dict[str, Any]:
        """Figures of one loop; what keeps it from running (no memory, no compiler, no graphs) stands in their place."""
        row = {"model": self.name, "image_size": list(self.shape[2:]), "batch": self.batch, "mode": mode}
        gc.collect()  # The loop before.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            return row | self._figures(mode)
        except Exception as error:  # Each mode stands on software of its own, and one that fails is to spare the rest.
            return row | {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}

    def _figures(self, mode: str) -> dict[str, Any]:
        amp = self.options.precision == "bf16"
        loop = LOOPS[mode](self.model, self.tables, self.shape, self.device, amp=amp)
        first_s, step_s = _step_seconds(loop, self.options.steps, self.device)
        images_per_s = self.batch / step_s
        if mode == "plain":
            self.plain = images_per_s
        speed = self.flops / step_s
        figures: dict[str, Any] = {
            "images_per_s": _rounded(images_per_s),
            "first_steps_s": _rounded(first_s),
            "model_tflops": _rounded(speed / 1e12),
            "share_of_peak": _rounded(speed / self.peak),
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        if self.plain:
            figures["times_plain"] = _rounded(images_per_s / self.plain)
        if self.options.kernels and mode != "plain":
            figures["kernels"] = top_kernels(loop.step, self.device, self.options.kernels)
        return figures


@lru_cache(maxsize=1)
def _models(arch: str, image_size: tuple[int, int]) -> Models:
    """Built once for all batches; each loop trains a copy."""
    return build_models(model_spec(arch, image_size, IDENTITIES))


def _step_seconds(loop: OurLoop, steps: int, device: torch.device) -> tuple[float, float]:
    """Time of the first three steps, with compiling and warming up, and of a warm one in a stretch of them."""

    def stretch():
        for _ in range(steps):
            loop.step()

    first_s = seconds(lambda: [loop.step() for _ in range(3)], device)
    return first_s, statistics.median(seconds(stretch, device) for _ in range(3)) / steps


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
