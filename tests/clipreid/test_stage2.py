"""Stage 2's losses: whole training steps against the reference figures, every variant against its definition."""

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipreid.loss_settings import TextLoss
from clipreid.model.encoders import Features
from clipreid.model.reid import ReIDOutput
from clipreid.optim import adam, parameter_groups
from clipreid.stage2 import batch_texts, losses
from tests.helpers.golden_models import case_images, case_models, case_spec, read_case, scaled_error
from tests.helpers.settings import loss_settings
from tests.helpers.tables import gradient_of, table_of
from tests.helpers.tolerances import close, within

# The reference's part -> ours
PARTS = {name: name for name in ("id_img", "id_proj", "tri_img", "tri_proj", "i2tce")}
PARTS |= {"tri_last": "tri_pre", "total": "loss"}


def our_name(name):
    return name.replace("visual.", "image_encoder.").removeprefix("reid.")


# Gradients that are zero by symmetry: only rounding would be compared.
def meaningful(name, gradient):
    if name.endswith("attnpool.k_proj.bias"):
        return gradient[:0]
    if name.endswith("in_proj_bias"):
        third = len(gradient) // 3
        return torch.cat([gradient[:third], gradient[2 * third :]])
    return gradient


VIT = (torch.float32, (1e-5, 1e-4), 1e-4, 1e-5, 1e-4, 0.01, 0.1, 1e-2)
TOLERANCES = [
    # dtype, loss parts of step 0 and 1, gradient norm, gradient head, full gradient, share of the weights beyond so
    # many learning rates, how far all moved
    ("stage2_vit_s16", *VIT),
    ("stage2_vit_s12_cam", *VIT),
    # float32 is limited by ReLU units that flip near zero
    ("stage2_rn50", torch.float32, (1e-5, 2e-4), 5e-3, 1e-2, 2e-2, 0.03, 0.1, 3e-2),
    # float64 by how its figures are stored: full gradients as float32, which takes up to 6e-8 from the largest entry
    ("stage2_rn50", torch.float64, (1e-7, 1e-5), 1e-7, 1e-7, 2e-7, 0.0, 1e-5, 3e-5),
]


@pytest.mark.slow
@pytest.mark.parametrize("tolerances", TOLERANCES, ids=lambda row: f"{row[0]}-{row[1]}".replace("torch.", ""))
def test_training_steps_match_the_reference_figures(tolerances, tmp_path):
    """Loss parts, gradients of all parameters, weights and running statistics after an Adam step per batch."""
    name, dtype, part_tolerance, *others = tolerances
    golden, case = read_case(name)
    models = case_models(case_spec(case, case["net"]), case["net"])
    model, classifiers = models.model.to(dtype).train(), models.tables.to(dtype).classifiers
    del models  # Its text side takes room.
    names = [our_name(n) for n in golden["names"]]
    named = [*model.named_parameters(), *((table.name, table.block) for table in classifiers)]
    trained = {n: p for n, p in named if p.requires_grad}
    assert sorted(trained) == sorted(names)
    torch.save({n: p.detach() for n, p in trained.items()}, tmp_path / "before.pt")
    lr = float(golden["lr"])
    optimizer = adam(parameter_groups(named, float(golden["wd"]), bias_lr_factor=2.0))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]

    settings = loss_settings(id_weight=float(golden["w_id"]), label_smoothing=float(golden["eps"]))
    texts = table_of(torch.from_numpy(golden["text_features"]).to(dtype), frozen=True)
    cameras = torch.tensor(case.get("cams", [-1] * 8))
    for k, labels in enumerate(torch.from_numpy(golden["labels"])):
        images = case_images(case["images"] + str(k), len(labels), case).to(dtype)
        output = model(images, cameras, None, 2 if case["net"] == "vit" else None)
        parts = losses(output, labels, classifiers, settings, text_features=texts)
        for part, reference in zip(golden["part_names"], golden["loss_parts"][k], strict=True):
            close(parts[PARTS[part]], reference, rtol=part_tolerance[k], what=(k, part))
        optimizer.zero_grad()
        parts["loss"].backward()
        if k == 0:
            check_gradients(golden, names, trained, *others[:3])
        optimizer.step()
    optimizer.zero_grad()
    del optimizer, output, parts
    check_weights(golden, names, trained, torch.load(tmp_path / "before.pt"), lr, *others[3:])
    check_statistics(golden, model)


def check_gradients(golden, names, trained, norm_tolerance, head_tolerance, full_tolerance):
    for i, name in enumerate(names):
        norm, gradient = golden["grad_norm"][i], trained[name].grad.double()
        if len(meaningful(name, gradient)):
            close(gradient.norm(), norm, rtol=norm_tolerance, what=name)
        count = int(np.isfinite(golden["grad_head"][i]).sum())
        head = meaningful(name, gradient.flatten())[:count]
        within(np.abs(head.numpy() - golden["grad_head"][i][: len(head)]).max(initial=0) / norm, head_tolerance, name)
    for key in (key for key in golden if key.startswith("grad__")):
        within(scaled_error(trained[our_name(key.removeprefix("grad__"))].grad, golden[key]), full_tolerance, key)


def check_weights(golden, names, trained, before, lr, share, lrs, delta_tolerance):
    """All but a `share` of the entries are within `lrs` learning rates; sums are as far off as the way moved may be."""
    off = []
    for i, name in enumerate(names):
        value = trained[name].detach().double()
        reference = golden["after_head"][i][np.isfinite(golden["after_head"][i])]
        off.append(np.abs(value.flatten()[: len(reference)].numpy() - reference) / lr)
        moved = (value - before[name].double()).norm().item()
        close(moved, golden["after_delta_norm"][i], rtol=delta_tolerance, what=name)
        furthest = golden["after_delta_norm"][i] * value.numel() ** 0.5
        within(abs(value.sum() - golden["after_sum"][i]) / furthest, delta_tolerance, name)
    within((np.concatenate(off) >= lrs).mean(), share)


def check_statistics(golden, model):
    """Running statistics, and the neck's bias, which must not have moved."""
    state = model.state_dict()
    keys = [key for key in golden if key.startswith("after__")]
    assert len(keys) >= 3
    for key in keys:
        within(scaled_error(state[our_name(key.removeprefix("after__"))], golden[key]), 1e-4, key)


IDENTITIES, WIDTH = 10, 6


def toy_output(labels, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    n = len(labels)
    features = Features(leaf(n, 4), leaf(n, 5), leaf(n, WIDTH))
    classifiers = [table_of(leaf(IDENTITIES, 5)), table_of(leaf(IDENTITIES, WIDTH))]
    return ReIDOutput(features, (leaf(n, 5), leaf(n, WIDTH))), classifiers, leaf(IDENTITIES, WIDTH).detach()


def slow_triplet(features, labels, margin):
    total = 0.0
    for i in range(len(labels)):
        distances = (features[i] - features).square().sum(1).clamp(min=1e-12).sqrt()
        same = labels == labels[i]
        total += (distances[same].max() - distances[~same].min() + margin).clamp(min=0)
    return total / len(labels)


def slow_losses(output, classifiers, labels, texts, settings):
    """The weighted sum of ID, triplet and text losses (Eq. 6 to 9), one part after the other."""
    smoothing = settings.label_smoothing
    parts = {
        f"id_{n}": F.cross_entropy(neck @ table.block.T, labels, label_smoothing=smoothing)
        for n, neck, table in zip(("img", "proj"), output.necks, classifiers, strict=True)
    }
    for level, features in output.features._asdict().items():
        if level != "pre" or settings.triplet_levels == 3:
            parts[f"tri_{level}"] = slow_triplet(features, labels, settings.margin)
    proj = output.features.proj
    log_prob = (texts[labels] @ proj.T).log_softmax(1)
    per_image = [log_prob[i][labels == labels[i]].mean() for i in range(len(labels))]
    text = {
        "none": {},
        "i2t": {"i2t": F.cross_entropy(proj @ texts[labels].T, torch.arange(len(labels)))},
        "t2i": {"t2i": -torch.stack(per_image).mean()},
        "i2tce": {"i2tce": F.cross_entropy(proj @ texts.T, labels, label_smoothing=smoothing)},
    }
    used = {}
    for name in settings.text_loss.split("+"):
        used |= text[name]
    identity = parts["id_img"] + parts["id_proj"]
    triplet = sum(v for n, v in parts.items() if n.startswith("tri"))
    loss = settings.id_weight * identity + settings.triplet_weight * triplet + settings.text_weight * sum(used.values())
    return {**parts, **used, "loss": loss}


@pytest.mark.parametrize("text_loss", get_args(TextLoss))
@pytest.mark.parametrize("triplet_levels", [2, 3])
def test_every_variant_is_the_sum_of_its_parts(text_loss, triplet_levels):
    labels = torch.tensor([3, 3, 0, 0, 7, 7, 7, 9])
    output, classifiers, texts = toy_output(labels)
    settings = loss_settings(triplet_weight=1.5, text_weight=0.7, text_loss=text_loss, triplet_levels=triplet_levels)
    bank, own_texts = table_of(texts, frozen=True), texts[labels] if "2" in text_loss.replace("i2tce", "") else None
    parts = losses(output, labels, classifiers, settings, text_features=bank, own_texts=own_texts)
    for name, value in slow_losses(output, classifiers, labels, texts, settings).items():
        torch.testing.assert_close(parts[name], value, msg=name)
    expected = {"id_img", "id_proj", "tri_img", "tri_proj", "id", "triplet", "loss"}
    expected |= {"tri_pre"} if triplet_levels == 3 else set()
    expected |= {"text", *text_loss.split("+")} if text_loss != "none" else set()
    assert set(parts) == expected


def test_one_stage_sends_gradients_to_tokens_and_image_features():
    """Stage 1's losses over the batch; each identity's text is encoded once and counts for all its images."""
    labels = torch.tensor([3, 3, 0, 0, 7, 7, 9, 9])
    output, classifiers, texts = toy_output(labels)
    tokens, asked = table_of(torch.cat([texts, torch.arange(IDENTITIES)[:, None]], dim=1)), []

    def text(rows):
        asked.append(rows[:, WIDTH].tolist())
        return rows[:, :WIDTH]

    settings = loss_settings(text_loss="i2t+t2i")
    own_texts = batch_texts(text, tokens, labels[::2], 2)
    parts = losses(output, labels, classifiers, settings, own_texts=own_texts)
    parts["loss"].backward()
    ours = [gradient_of(tokens)[:, :WIDTH], output.features.proj.grad]
    texts.requires_grad_()
    slow = slow_losses(output, classifiers, labels, texts, settings)
    gradients = ours, torch.autograd.grad(slow["loss"], [texts, output.features.proj])
    torch.testing.assert_close(parts["loss"], slow["loss"])
    for ours, expected in zip(*gradients, strict=True):
        assert expected.any()
        torch.testing.assert_close(ours, expected)
    assert asked == [[3, 0, 7, 9]]
