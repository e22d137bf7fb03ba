"""Losses and their gradients on a GPU against float64 on the CPU: TF32 would be a hundred times too far off."""

import torch
import torch.nn.functional as F

from clipreid import stage1, stage2
from clipreid.identity_table import IdentityTable
from clipreid.model.encoders import Features
from clipreid.model.reid import ReIDOutput
from tests.helpers.devices import DEVICE, on_gpu
from tests.helpers.settings import loss_settings
from tests.helpers.tolerances import within

B, N, WIDTHS = 64, 751, (768, 768, 512)
EXACT, FLOAT32 = ("cpu", torch.float64), (DEVICE, torch.float32)
TOLERANCE = 2e-5


def randoms(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stage2_losses(device, dtype):
    """Values and gradients of features, and of the classifiers' rows."""
    features = [F.normalize(randoms(i, B, width)).mul(8).to(device, dtype) for i, width in enumerate(WIDTHS)]
    for value in features:
        value.requires_grad_()
    rows = [randoms(10 + i, N, width).mul(0.1).to(device, dtype) for i, width in enumerate(WIDTHS[1:])]
    classifiers = [IdentityTable("classifier", N, block) for block in rows]
    texts = IdentityTable.frozen("texts", N, randoms(20, N, WIDTHS[2]).mul(0.1).to(device, dtype))
    labels = (torch.arange(B) // 4 * 7).to(device)
    output = ReIDOutput(Features(*features), (features[1] * 2, features[2] * 2))
    own = texts.block[labels]
    settings = loss_settings(text_loss="i2tce+t2i")
    losses = stage2.losses(output, labels, classifiers, settings, text_features=texts, own_texts=own)
    losses["loss"].backward()
    gradients = [value.grad for value in (*features, *(table.block for table in classifiers))]
    return losses, gradients


def stage1_losses(device, dtype):
    """Values and the gradient of the tokens."""
    tokens = IdentityTable("tokens", N, randoms(0, N, 4, 32).to(device, dtype))
    weights = randoms(1, 4 * 32, 512).mul(0.05).to(device, dtype)
    labels = torch.arange(B) // 4 * 7
    images = randoms(2, B, 512).mul(0.3).to(device, dtype)
    encode = lambda rows: rows.flatten(1) @ weights  # noqa: E731
    losses = stage1.step(encode, tokens, images, labels)
    losses["loss"].backward()
    return losses, [tokens.lent_gradient()[1]]


def check(compute):
    (exact, exact_gradients), (found, gradients) = compute(*EXACT), compute(*FLOAT32)
    for name, value in exact.items():
        within(abs(found[name].item() - value.item()) / abs(value.item()), TOLERANCE, name)
    for value, expected in zip(gradients, exact_gradients, strict=True):
        within((value.cpu().double() - expected).norm() / expected.norm(), TOLERANCE)


@on_gpu
def test_stage_2s_losses_on_a_gpu_are_whole_float32():
    check(stage2_losses)


@on_gpu
def test_stage_1s_losses_on_a_gpu_are_whole_float32():
    check(stage1_losses)
