"""A batch in pieces has the losses and gradients of the batch at once, for every loss, and needs less memory."""

from typing import get_args

import pytest
import torch

from clipreid import stage2
from clipreid.loss_settings import TextLoss
from clipreid.weights.initial import build_models
from tests.helpers.golden_models import ROOT_CONFIGS
from tests.helpers.memory import peak_memory_mb
from tests.helpers.processes import on_processes
from tests.helpers.settings import loss_settings, model_spec
from tests.helpers.tables import gradient_of, table_of
from tests.helpers.tolerances import close

IDENTITIES, PER = 8, 2
BATCH = IDENTITIES * PER


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def losses_and_gradients(text_loss, micro_batch):
    """i2t+t2i: the one-stage method, where the tokens learn as well."""
    spec = model_spec(str(ROOT_CONFIGS / "tiny_vit.json"), image_size=(32, 16), identities=9, sie="camera", cameras=3)
    model, text, tables = build_models(spec, seed=0)
    model, text, tables = model.double().train(), text.double(), tables.to(torch.float64)
    identities = torch.arange(IDENTITIES)
    labels, cameras = identities.repeat_interleave(PER), torch.arange(BATCH) % 4 - 1
    bank = table_of(random(9, text.text_encoder.text_projection.shape[1], seed=2), frozen=True)
    own_texts = stage2.batch_texts(text, tables.tokens, identities, PER) if text_loss == "i2t+t2i" else None
    if own_texts is None and {"i2t", "t2i"} & set(text_loss.split("+")):
        own_texts = bank.block[labels]
    output = model(random(BATCH, 3, 32, 16, seed=1), cameras, None, micro_batch)
    settings = loss_settings(text_loss=text_loss)
    parts = stage2.losses(output, labels, tables.classifiers, settings, text_features=bank, own_texts=own_texts)
    parts["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients |= {table.name: gradient_of(table) for table in tables}
    buffers = {name: buffer for name, buffer in model.named_buffers() if "running" in name}
    return {name: value.detach() for name, value in parts.items()} | buffers, gradients


@pytest.mark.parametrize("pieces", [1, 2, 4, 8, 3])
@pytest.mark.parametrize("text_loss", get_args(TextLoss))
def test_pieces_give_the_losses_statistics_and_gradients_of_the_whole_batch(text_loss, pieces):
    whole, expected = losses_and_gradients(text_loss, None)
    values, gradients = losses_and_gradients(text_loss, -(-BATCH // pieces))
    assert gradients.keys() == expected.keys() and {"cv_embed", "image_encoder.conv1.weight"} <= gradients.keys()
    for name, value in whole.items():
        torch.testing.assert_close(values[name], value, rtol=1e-9, atol=1e-12)
    for name, value in expected.items():
        assert (gradients[name] - value).abs().max() <= 1e-6 * value.abs().max() + 1e-12, name


def test_autocast_reaches_both_passes():
    spec = model_spec(str(ROOT_CONFIGS / "tiny_vit.json"), image_size=(32, 16), identities=9)

    def gradient(micro_batch):
        model = build_models(spec, seed=0).model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(random(BATCH, 3, 32, 16, seed=1).float(), None, None, micro_batch)
        (output.features.proj * random(BATCH, 16, seed=3).float()).sum().backward()
        return model.image_encoder.transformer.resblocks[0].mlp.c_fc.weight.grad

    whole = gradient(None)
    close(gradient(4) / whole.abs().max(), whole / whole.abs().max(), atol=0.02)


def peak_mb(team, micro_batch):
    """Of one step of a small ViT, above what was there before."""
    spec = model_spec(str(ROOT_CONFIGS / "small_vit.json"), image_size=(128, 64), identities=9)
    model = build_models(spec, seed=0).model.train()
    model(torch.zeros(2, 3, 128, 64)).features.proj.sum().backward()
    before = peak_memory_mb()
    model(torch.zeros(128, 3, 128, 64), None, None, micro_batch).features.proj.sum().backward()
    return peak_memory_mb() - before


def test_a_step_in_8_pieces_needs_less_than_half_of_the_memory():
    (whole,), (pieces,) = (on_processes(1, peak_mb, micro_batch) for micro_batch in (None, 16))
    assert whole > 200 and pieces < 0.45 * whole
