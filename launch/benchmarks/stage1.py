"""Samples per second of a stage 1 step, against the step written the plain way, in one run.

Ours: `clipreid.stage1.step` (prompts cut at the end token, the common prefix encoded once, each identity encoded
once, no gradients for the frozen tower), backward pass and Adam. Plain: 77 positions, every image its own prompt, the
gradients of the tower's weights computed and thrown away. Both give the same losses, which is checked on the way.
"""

import argparse
import copy
from typing import Any, cast

import torch
from torch import Tensor

from clipreid import stage1
from clipreid.identity_table import IdentityTable
from clipreid.losses import image_to_text, text_to_image
from clipreid.model.prompts import PromptedText
from clipreid.weights.initial import build_models
from cluster.training.trained_table import TrainedTable
from launch.cli import Parser, positive
from launch.measure.published import model_spec
from launch.measure.timing import choose_device, machine_facts, median_seconds_in_turn

EXAMPLE = """examples:
  python launch/bench.py stage1
  python launch/bench.py stage1 --arch configs/models/small_vit.json --rounds 20

The aim on a CPU is 8 times the plain step where all 64 identities differ, 20 times for 16 identities x 4."""
WEIGHT_DECAY = 1e-4
LR = 3.5e-4


def run(arguments: list[str]) -> dict[str, Any]:
    options = _options(arguments)
    device = choose_device(options.device)
    spec = model_spec(options.arch, (256, 128), options.identities)
    _, text, tables = build_models(spec)
    assert text is not None and tables.tokens is not None
    text.to(device).eval()
    tables.to(device)
    cases = [_case(text, tables.tokens, options, per, device) for per in (1, 4)]
    return {
        "bench": "stage1",
        **machine_facts(device),
        "arch": options.arch,
        "precision": options.precision,
        "batch": options.batch,
        "dataset_identities": options.identities,
        "rounds": options.rounds,
        "cases": cases,
    }


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py stage1", description=__doc__, epilog=EXAMPLE)
    parser.add_argument(
        "--arch", default="ViT-B-16-quickgelu", help="open_clip model name or JSON file (random weights)"
    )
    parser.add_argument("--batch", type=positive, default=64, help="images in a batch, a multiple of 4")
    parser.add_argument("--identities", type=positive, default=751, help="identities whose tokens learn")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="of both steps' tower")
    parser.add_argument("--rounds", type=positive, default=5, help="steps of each kind that are timed, in turn")
    parser.add_argument("--device", help="default: cuda where there is one")
    options = parser.parse_args(arguments)
    if options.batch < 4 or options.batch % 4 or options.identities < options.batch:
        parser.error("--batch must be a multiple of 4, and --identities at least as large")
    return options


def _case(
    text: PromptedText, tokens: IdentityTable, options, per_identity: int, device: torch.device
) -> dict[str, Any]:
    """A batch in which every identity has `per_identity` images."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randperm(options.identities, generator=generator)[: options.batch // per_identity]
    labels = distinct.repeat_interleave(per_identity)
    images = torch.randn(options.batch, feature_width(text), generator=generator).to(device)
    amp = options.precision == "bf16"
    ours, plain = (kind(text, tokens, images, labels, amp) for kind in (OurStep, PlainStep))
    first = ours.loss().item(), plain.loss().item()
    taken = median_seconds_in_turn({"ours": ours, "plain": plain}, options.rounds, device)
    return {
        "identities": len(distinct),
        "images_per_identity": per_identity,
        "samples_per_s": round(options.batch / taken["ours"], 2),
        "plain_samples_per_s": round(options.batch / taken["plain"], 3),
        "ratio": round(taken["plain"] / taken["ours"], 2),
        "relative_loss_difference": abs(first[0] - first[1]) / abs(first[1]),
    }


def feature_width(text: PromptedText) -> int:
    """D, width of the features that images and texts share."""
    tower: Any = text.text_encoder  # Its parts are open_clip's, which carry no types.
    return tower.text_projection.shape[1]


class OurStep:
    """Losses, backward pass and Adam, as `cluster.training.stage1` takes them on one worker."""

    def __init__(self, text: PromptedText, tokens: IdentityTable, images: Tensor, labels: Tensor, amp: bool):
        self.text, self.tokens = copy.deepcopy(text), copy.deepcopy(tokens)
        self.images, self.labels = images, labels
        self.amp = amp
        self.learning = TrainedTable(tokens.name, self.tokens, weight_decay=WEIGHT_DECAY)
        self.learning.adam.param_groups[0]["lr"] = LR

    def __call__(self) -> None:
        self.loss().backward()
        self.learning.step()

    def loss(self) -> Tensor:
        return stage1.step(self._encode, self.tokens, self.images, self.labels)["loss"]

    def _encode(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.amp):
            return self.text(tokens)


class PlainStep(OurStep):
    """The same losses from 77 positions and one prompt per image; the tower's gradients are computed, not used."""

    def __init__(self, text: PromptedText, tokens: IdentityTable, images: Tensor, labels: Tensor, amp: bool):
        super().__init__(text, tokens, images, labels, amp)
        self.labels = labels.to(images.device)
        self.optimizer = torch.optim.Adam([self.tokens.block], lr=LR, weight_decay=WEIGHT_DECAY)
        self.text.text_encoder.requires_grad_(True)
        self.tower = cast(Any, self.text.text_encoder)  # As in `feature_width`.
        context = len(self.tower.positional_embedding)
        self.mask = images.new_full((context, context), float("-inf")).triu_(1)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.text.text_encoder.zero_grad()

    def loss(self) -> Tensor:
        texts = self._encode_uncut(self.labels).float()
        i2t = image_to_text(self.images, texts, texts).mean()
        return i2t + text_to_image(texts, self.labels, self.images, self.labels).mean()

    def _encode_uncut(self, labels: Tensor) -> Tensor:
        tower, learner = self.tower, self.text.prompt_learner
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.amp):
            x = learner.uncut(self.tokens.block[labels]) + tower.positional_embedding
            x = tower.ln_final(tower.transformer(x, attn_mask=self.mask))
            return x[:, learner.length - 1] @ tower.text_projection
