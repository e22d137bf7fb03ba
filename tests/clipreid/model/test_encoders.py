"""Image encoders and the model around them: against the reference figures, open_clip's own towers, plain loops."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch

from clipreid.errors import ModelError
from clipreid.model.arch import check_arch
from clipreid.model.encoders import resize_positions
from clipreid.model.reid import descriptor
from clipreid.model.spec import ModelSpec
from clipreid.weights.initial import build_models, empty_models
from tests.helpers.golden_models import ROOT_CONFIGS, case_images, case_models, case_spec, read_case, scaled_error
from tests.helpers.settings import model_spec
from tests.helpers.tolerances import close, within

VIT, RESNET = str(ROOT_CONFIGS / "tiny_vit.json"), str(ROOT_CONFIGS / "tiny_rn.json")


def tiny_spec(arch=VIT, **changes) -> ModelSpec:
    fields = {"image_size": (48, 32), "identities": 5, **changes}
    return model_spec(arch, **fields)


def random_images(count=4, size=(48, 32), seed=0):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


ENCODER_CASES = ["vit_s16_256x128", "vit_s12_256x128_cam", "vit_s16_256x256_camview", "rn50_256x128"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODER_CASES)
def test_encoder_matches_the_reference_figures(name):
    """Evaluation features, scores and descriptor; one training pass; running statistics after it."""
    golden, case = read_case(name)
    model, _, tables = case_models(case_spec(case, case["net"]), case["net"])
    images = case_images(case["images"], case["n"], case)
    assert np.array_equal(images[:, :, :2, :2].numpy(), golden["image_check"])
    cameras = torch.tensor(case.get("cams", [-1] * case["n"]))
    views = torch.tensor(case.get("views", [-1] * case["n"]))
    encoder = model.image_encoder
    positions = encoder.attnpool.positional_embedding if case["net"] == "rn50" else encoder.positional_embedding
    within(scaled_error(positions[:, :4], golden["resized_pos_slice"]), 5e-6)

    with torch.no_grad():
        output = model.eval()(images, cameras, views)
        check_output(golden, "eval_", output, tables, scores=2e-5)
        within(scaled_error(descriptor_unnormalised(output.features)[:2], golden["eval_descriptor"]), 2e-5)
        output = model.train()(images, cameras, views)
        check_output(golden, "train_", output, tables, scores=5e-5)
    statistics = {key: value for key, value in golden.items() if key.startswith("after_train__")}
    state = model.state_dict()
    for key, value in statistics.items():
        ours = key.removeprefix("after_train__").replace("visual.", "image_encoder.").removeprefix("reid.")
        within(scaled_error(state[ours], value), 1e-4, key)
    assert len(statistics) >= 2


def logits_of(output, tables):
    return [neck @ table.block.T for neck, table in zip(output.necks, tables.classifiers, strict=True)]


def check_output(golden, prefix, output, tables, scores):
    """Features to 2e-5, scores to the given tolerance."""
    names = ("f_last", "f_img", "f_proj", "score_img", "score_proj")
    values = dict(zip(names, (*output.features, *logits_of(output, tables)), strict=True))
    checked = [name for name in names if prefix + name in golden]
    assert len(checked) >= 2
    for name in checked:
        tolerance = scores if name.startswith("score") else 2e-5
        within(scaled_error(values[name], golden[prefix + name]), tolerance, prefix + name)


def descriptor_unnormalised(features):
    """The reference's descriptor is stored before its normalisation: undo ours by its own length."""
    length = torch.cat([features.img, features.proj], dim=1).norm(dim=1, keepdim=True)
    return descriptor(features, ("img", "proj")) * length


def test_position_resize_equals_a_plain_loop_over_cells():
    source = torch.randn(1 + 3 * 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, columns = 5, 2
    resized = resize_positions(source, (rows, columns))
    assert torch.equal(resized[0], source[0])
    grid = source[1:].reshape(3, 3, 5)
    for r in range(rows):
        for c in range(columns):
            y = min(max((r + 0.5) * 3 / rows - 0.5, 0), 2)
            x = min(max((c + 0.5) * 3 / columns - 0.5, 0), 2)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, 2), min(x0 + 1, 2)
            top = grid[y0, x0] * (1 - (x - x0)) + grid[y0, x1] * (x - x0)
            bottom = grid[y1, x0] * (1 - (x - x0)) + grid[y1, x1] * (x - x0)
            expected = top * (1 - (y - y0)) + bottom * (y - y0)
            torch.testing.assert_close(resized[1 + r * columns + c], expected)


def test_same_cell_count_in_another_shape_is_resized():
    """4x4 and 2x8 cells have as many rows: the embedding must not be taken over as it is."""
    source = torch.randn(17, 3, generator=torch.Generator().manual_seed(2))
    assert not torch.allclose(resize_positions(source, (2, 8)), source)
    assert torch.equal(resize_positions(source, (4, 4)), source)


@pytest.mark.parametrize("arch", [VIT, RESNET])
def test_features_at_native_size_equal_open_clips_own_tower(arch):
    """`proj` is what open_clip encodes, and the two earlier features are its intermediates."""
    spec = tiny_spec(arch, image_size=(32, 32))
    model, *_ = build_models(spec, seed=4)
    encoder = model.double().image_encoder
    visual = open_clip.CLIP(**spec.arch_config).double().visual
    if arch == RESNET:  # the native tower strides in its last stage: compare with that undone in both
        visual.layer4[0].avgpool = visual.layer4[0].downsample[0] = torch.nn.Identity()
        visual.attnpool.positional_embedding = torch.nn.Parameter(encoder.attnpool.positional_embedding.detach())
    visual.load_state_dict(encoder.state_dict())
    images = random_images(size=(32, 32)).double()
    for mode in (False, True):  # training last: each pass of it moves the running statistics
        ours, theirs = encoder.train(mode)(images), visual.train(mode)
        torch.testing.assert_close(ours.proj, theirs(images))
        if arch == VIT:
            tokens = theirs.transformer(theirs._embeds(images))
            _, before = theirs.transformer.forward_intermediates(theirs._embeds(images), indices=[0])
            torch.testing.assert_close(ours.pre, before[0][:, 0])
            torch.testing.assert_close(ours.img, theirs.ln_post(tokens)[:, 0])
        else:
            maps = theirs.forward_intermediates(images)["image_intermediates"]
            torch.testing.assert_close(ours.pre, maps[3].mean((2, 3)))
            torch.testing.assert_close(ours.img, maps[4].mean((2, 3)))


def test_overlapping_patches_give_the_stated_grid():
    spec = tiny_spec(stride=6)
    model, *_ = build_models(spec)
    assert spec.grid == ((48 - 8) // 6 + 1, (32 - 8) // 6 + 1) == (7, 5)
    assert model.image_encoder.conv1(random_images()).shape[2:] == spec.grid
    assert len(model.image_encoder.positional_embedding) == 1 + 7 * 5
    model.features(random_images())


def test_resnets_last_map_is_a_sixteenth():
    model, *_ = build_models(tiny_spec(RESNET))
    shapes = {}
    model.image_encoder.layer4.register_forward_hook(lambda *call: shapes.update(map=call[2].shape[2:]))
    model.features(random_images())
    assert shapes["map"] == (3, 2)


def with_table(**changes):
    model, *_ = build_models(tiny_spec(**changes), seed=1)
    torch.nn.init.normal_(model.cv_embed, generator=torch.Generator().manual_seed(0))
    return model.eval()


def test_side_information_picks_the_documented_row():
    cameras, views = torch.tensor([0, 2, 1, 2]), torch.tensor([1, 0, 1, 1])
    rows = {"camera": cameras, "view": views, "camera+view": cameras * 2 + views}
    for sie, row in rows.items():
        model = with_table(sie=sie, cameras=3, views=2, sie_coefficient=3.0)
        assert len(model.cv_embed) == {"camera": 3, "view": 2, "camera+view": 6}[sie]
        close(model.side_information(cameras, views), 3.0 * model.cv_embed[row], rtol=1.3e-6, atol=1e-5)


def test_unknown_camera_or_view_adds_nothing():
    """-1, and numbers that the table has no row for, as happens on another dataset."""
    model = with_table(sie="camera+view", cameras=3, views=2)
    cameras, views = torch.tensor([-1, 1, -1, 3, 0, 2]), torch.tensor([1, -1, -1, 0, 2, 1])
    known = [False, False, False, False, False, True]
    assert model.side_information(cameras, views).any(dim=1).tolist() == known
    images = random_images(6)
    plain, informed = model.features(images), model.features(images, cameras, views)
    assert [torch.equal(a, b) for a, b in zip(plain.img, informed.img, strict=True)] == [not k for k in known]


def test_without_cameras_and_views_there_is_no_side_information():
    model = with_table(sie="camera", cameras=3)
    unknown = torch.full((4,), -1)
    assert torch.equal(model.features(random_images()).proj, model.features(random_images(), unknown).proj)


@pytest.mark.parametrize("sie_tokens", ["cls", "all"])
def test_side_information_enters_the_stated_tokens(sie_tokens):
    model = with_table(sie="camera", cameras=3, sie_tokens=sie_tokens)
    encoder, images = model.image_encoder, random_images()
    sie = model.side_information(torch.tensor([0, 1, 2, -1]), None)
    difference = encoder.embed(images, sie) - encoder.embed(images)
    tokens = difference.shape[1] if sie_tokens == "all" else 1
    close(difference[:, :tokens], sie[:, None].expand(-1, tokens, -1), rtol=1.3e-6, atol=1e-5)
    assert not difference[:, tokens:].any()


def test_only_the_rows_of_known_cameras_learn():
    model = with_table(sie="camera", cameras=4)
    model.side_information(torch.tensor([2, -1, 2, 3]), None).sum().backward()
    assert model.cv_embed.grad.any(dim=1).tolist() == [False, False, True, True]


def test_heads_are_initialised_as_published():
    spec = tiny_spec(str(ROOT_CONFIGS / "small_vit.json"), image_size=(64, 64), identities=400)
    spec = dataclasses.replace(spec, sie="camera", cameras=300)
    model, _, tables = build_models(spec)
    for weight, std in ((table.block, 1e-3) for table in tables.classifiers):
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert abs(weight.mean().item()) < std / 50
    assert model.cv_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert tables.tokens.block.std().item() == pytest.approx(0.02, rel=0.02)
    for neck in (model.bottleneck, model.bottleneck_proj):
        assert neck.weight.requires_grad and (neck.weight == 1).all()
        assert not neck.bias.requires_grad and not neck.bias.any()


def test_construction_depends_on_the_seed_and_leaves_the_global_state_alone():
    spec = tiny_spec(sie="camera", cameras=2)
    state = torch.random.get_rng_state()
    one, other = (build_models(spec, seed=7) for _ in range(2))
    torch.manual_seed(123)
    third, different = build_models(spec, seed=7), build_models(spec, seed=8)
    torch.random.set_rng_state(state)
    build_models(spec, seed=9)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
        assert torch.equal(value, third.state_dict()[name]), name
    for table, another in zip(one.tables, different.tables, strict=True):
        assert not torch.equal(table.block, another.block), table.name
    assert not torch.equal(one[0].image_encoder.proj, different[0].image_encoder.proj)


def test_descriptor_is_normalised_as_one_vector():
    model, *_ = build_models(tiny_spec())
    features = model.features(random_images())
    joined = torch.cat([features.img, features.proj], dim=1)
    close(descriptor(features, ("img", "proj")), joined / joined.norm(dim=1, keepdim=True), rtol=1.3e-6, atol=1e-5)
    assert descriptor(features, ("proj", "pre")).shape == (4, 16 + 32)


def test_no_parameter_is_without_dimensions():
    """DeepSpeed's partitioning fails on scalars, such as CLIP's logit_scale."""
    for arch in (VIT, RESNET):
        model, text, _ = build_models(tiny_spec(arch))
        assert all(p.dim() > 0 for part in (model, text) for p in part.parameters())


@pytest.mark.parametrize("arch", [VIT, RESNET])
def test_scores_stay_float32_under_autocast_and_float64_in_double(arch):
    model, *_ = build_models(tiny_spec(arch))
    images = random_images(8)
    exact = model.eval()(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
    assert {value.dtype for value in (*output.features, *output.necks)} == {torch.float32}
    within(scaled_error(output.features.img, exact.features.img.detach().numpy()), 0.03)
    output = model.double()(images.double())
    assert {value.dtype for value in (*output.features, *output.necks)} == {torch.float64}
    within(scaled_error(output.features.img, exact.features.img.detach().numpy()), 1e-4)


def test_channels_last_changes_nothing():
    model, *_ = build_models(tiny_spec(RESNET))
    images = random_images()
    expected = model.double().eval()(images.double())
    model = model.to(memory_format=torch.channels_last)
    output = model(images.double().to(memory_format=torch.channels_last))
    for ours, reference in zip(output.features, expected.features, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("arch", [VIT, RESNET])
def test_the_model_compiles_as_one_graph(arch):
    """fullgraph refuses branches that depend on data; "eager" runs the captured graph without a compiler."""
    sie = {"sie": "camera+view", "cameras": 3, "views": 2} if arch == VIT else {}
    model, *_ = build_models(tiny_spec(arch, **sie))
    cameras, views = torch.tensor([0, 2, -1, 1]), torch.tensor([0, 1, 1, -1])
    expected = model.eval()(random_images(), cameras, views)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    output = compiled(random_images(), cameras, views)
    for ours, reference in zip(output.necks, expected.necks, strict=True):
        close(ours, reference, rtol=1.3e-6, atol=1e-5)


REFUSED = {
    "ViT-B-16-SigLIP": "timm",
    "ViT-B-32-SigLIP2-256": "timm",
    "coca_ViT-B-32": "CoCa",
    "roberta-ViT-B-32": "text tower is Hugging Face's roberta-base",
    "convnext_base": "timm",
    "EVA02-B-16": "timm",
    "ViT-L-14-CLIPA": "not causal",
    "ViT-H-14-worldwide": "tokenizer is facebook/xlm-v-base",
    "ViT-B-16-quickgelo": "did you mean ViT-B-16-quickgelu",
    "no/such/file.json": "no such file",
}


@pytest.mark.parametrize(("arch", "reason"), REFUSED.items())
def test_unsupported_models_are_refused_in_one_line(arch, reason):
    with pytest.raises(ModelError, match=reason) as caught:
        check_arch(arch)
    assert arch in str(caught.value) and "\n" not in str(caught.value)


def test_a_tower_without_causal_mask_is_refused_whatever_else_it_is(tmp_path):
    path = tmp_path / "model.json"
    text = (ROOT_CONFIGS / "tiny_vit.json").read_text()
    path.write_text(text.replace('"heads": 2', '"heads": 2, "no_causal_mask": true'))
    with pytest.raises(ModelError, match="not causal"):
        check_arch(str(path))


FAULTY = [
    ('"embed_dim"', '"embed_dimm"', "embed_dim"),
    ('"mlp_ratio"', '"mlp_ration"', "unknown key vision_cfg.mlp_ration"),
    ('"head_width": 16', '"head_width": 5', "multiple of vision_cfg.head_width"),
    ('"vocab_size": 49408', '"vocab_size": 100', "vocab_size is 100"),
    ('"layers": 2', '"layers": 0', "a whole number from 1 to 16384, not 0"),
    ('"patch_size": 8', '"patch_size": 8, "patch_dropout": 0.5', "patch_dropout"),
    ("}", "", "not valid JSON"),
]


@pytest.mark.parametrize(("before", "after", "reason"), FAULTY)
def test_a_faulty_model_file_is_refused_in_one_line(tmp_path, before, after, reason):
    path = tmp_path / "model.json"
    path.write_text((ROOT_CONFIGS / "tiny_vit.json").read_text().replace(before, after))
    with pytest.raises(ModelError, match=reason) as caught:
        check_arch(str(path))
    assert "\n" not in str(caught.value)


def supported_names():
    for name in open_clip.list_models():
        try:
            check_arch(name)
        except ModelError:
            continue
        yield name


def test_every_clip_with_a_causal_text_tower_is_supported_by_name():
    names = set(supported_names())
    assert {"ViT-B-32", "ViT-L-14", "ViT-L-14-336", "RN101", "RN50x4", "ViT-H-14", "ViT-B-16-plus-240"} <= names
    for name in sorted(names):
        config = check_arch(name)
        size = config["vision_cfg"]["image_size"]
        spec = model_spec(name, image_size=(size // 32 * 32, size // 64 * 32))
        if size <= 256 and not {"H", "g", "e", "bigG"} & set(name.split("-")):  # billions of parameters
            model, _ = empty_models(spec)
            features = model.to("meta").eval().image_encoder(torch.empty(2, 3, *spec.image_size, device="meta"))
            assert tuple(value.shape[1] for value in features) == model.image_encoder.widths


SPEC_FAULTS = [
    (VIT, {"sie": "cameras"}, "none, camera, view, camera\\+view"),
    (VIT, {"sie": "view", "views": 0}, "0 views"),
    (VIT, {"stride": 9}, "between 1 and the patch size 8"),
    (VIT, {"image_size": (7, 32)}, "7x32 is smaller"),
    (VIT, {"prompt_tokens": 0}, "model.prompt_tokens is 0"),
    (RESNET, {"sie": "camera", "cameras": 4}, "needs a ViT"),
    (RESNET, {"stride": 12}, "leave it out"),
    (RESNET, {"image_size": (40, 32)}, "multiples of 16"),
]


@pytest.mark.parametrize(("arch", "changes", "reason"), SPEC_FAULTS)
def test_an_impossible_specification_is_refused(arch, changes, reason):
    with pytest.raises(ModelError, match=reason):
        tiny_spec(arch, **changes)


def test_specification_survives_json():
    spec = tiny_spec(stride=6, sie="camera+view", cameras=3, views=2, noun="big car")
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_checking_a_model_name_imports_neither_torch_nor_open_clip():
    fields = {name: value for name, value in model_spec("RN50").to_dict().items() if name != "arch_config"}
    code = (
        "import sys; from clipreid.model.arch import check_arch; from clipreid.model.spec import ModelSpec;"
        f"ModelSpec(arch_config=check_arch('RN50'), **{fields!r});"
        "sys.exit(bool({'torch', 'open_clip'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
