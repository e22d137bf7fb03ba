"""Weights in and out: every file format, the authors' checkpoints, our own file, and what is refused."""

import dataclasses
import json
import sys
from pathlib import Path

import open_clip.pretrained
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from clipreid.errors import ModelError
from clipreid.model.arch import check_arch, check_tag
from clipreid.model.prompts import template_ids
from clipreid.model.reid import descriptor
from clipreid.model.spec import ModelSpec
from clipreid.weights import download as download_module
from clipreid.weights.file import ModelCard, load_model, load_models, load_text, read_card, save_model, weights_file
from clipreid.weights.initial import build_models, empty_models
from clipreid.weights.official import holds_prompts, load_official, official_shapes, save_official
from clipreid.weights.pretrained import read_state_dict
from clipreid.weights.sealed import DamagedError
from launch import cli, export
from shards import storage
from tests.helpers.damage import flips
from tests.helpers.faults import small_disk
from tests.helpers.golden_models import (
    ARCH,
    ROOT_CONFIGS,
    case_images,
    case_spec,
    clip_file,
    clip_state,
    read_case,
    scaled_error,
    seeded,
)
from tests.helpers.settings import model_spec
from tests.helpers.tolerances import close, within

VIT, RESNET = str(ROOT_CONFIGS / "tiny_vit.json"), str(ROOT_CONFIGS / "tiny_rn.json")
OPENAI_MARKS = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}


def tiny_spec(arch=VIT, **changes) -> ModelSpec:
    fields = {"image_size": (48, 32), "identities": 5, "noun": "vehicle", **changes}
    return model_spec(arch, **fields)


def tiny_images(count=4):
    return torch.randn(count, 3, 48, 32, generator=torch.Generator().manual_seed(0))


def outputs(models):
    """Features, and text features of all identities."""
    model, text, tables = models
    with torch.no_grad():
        return [*model.eval().features(tiny_images()), text(tables.tokens.block), *(t.block for t in tables)]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def torchscript(state) -> torch.jit.ScriptModule:
    """An archive with the names of `state`, as OpenAI's are: nested modules, and the sizes as tensors."""

    class Node(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Node()
    for name, value in state.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in dict(node.named_children()):
                node.add_module(part, Node())
            node = dict(node.named_children())[part]
        node.register_buffer(leaf, value)
    return torch.jit.script(root)


def write_formats(state, folder):
    """The same weights in every accepted form."""
    torch.save(state, folder / "bare.pt")
    torch.save({"epoch": 3, "state_dict": state}, folder / "wrapped.pth")
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, folder / "prefixed.bin")
    save_file(state, folder / "names.safetensors")
    custom = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    save_file(
        {("text." + name if name.startswith(custom) else name): value for name, value in state.items()},
        folder / "custom_text.safetensors",
    )
    torch.jit.save(torchscript(state), folder / "archive.pt")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("arch", [VIT, RESNET])
def test_every_file_format_gives_the_same_features(arch, tmp_path):
    state = clip_state(check_arch(arch)) | {"logit_scale": torch.tensor(4.6)}
    files = write_formats(state, tmp_path)
    assert len(files) == 6
    results = [outputs(build_models(tiny_spec(arch), str(path), seed=1)) for path in files]
    for path, result in zip(files, results, strict=True):
        assert equal(result, results[0]), path.name
    assert not equal(outputs(build_models(tiny_spec(arch), None, seed=1)), results[0])


def test_openais_archive_is_read_with_its_half_precision_and_sizes(tmp_path):
    config = check_arch(VIT) | {"quick_gelu": True}
    state = {name: value.half() for name, value in clip_state(config).items()}
    marks = {name: torch.tensor(value) for name, value in OPENAI_MARKS.items()}
    torch.jit.save(torchscript(state | marks), tmp_path / "ViT.pt")
    torch.save({name: value.float() for name, value in state.items()}, tmp_path / "float.pt")
    spec = dataclasses.replace(tiny_spec(), arch_config=config)
    half, full = (build_models(spec, str(tmp_path / name)) for name in ("ViT.pt", "float.pt"))
    assert equal(outputs(half), outputs(full))
    assert {p.dtype for part in half[:2] for p in part.parameters()} == {torch.float32}
    with pytest.raises(ModelError, match='trained with QuickGELU, but .* computes GELU: set "quick_gelu"'):
        build_models(tiny_spec(), str(tmp_path / "ViT.pt"))


def test_a_file_with_a_larger_grid_is_resized_once(tmp_path):
    state = clip_state(check_arch(VIT))
    state["visual.positional_embedding"] = rows = torch.randn(1 + 6 * 6, 32)
    torch.save(state, tmp_path / "clip.pt")
    model, *_ = build_models(tiny_spec(), str(tmp_path / "clip.pt"))
    grid = F.interpolate(rows[1:].T.reshape(1, 32, 6, 6), size=(6, 4), mode="bilinear")
    expected = torch.cat([rows[:1], grid[0].flatten(1).T])
    close(model.image_encoder.positional_embedding, expected, rtol=1.3e-6, atol=1e-5)


def faulty(state, name, value=None):
    state = dict(state)
    state.pop(name, None)
    return state if value is None else state | {name: value}


CLIP_FAULTS = [
    ("visual.proj", torch.zeros(32, 17), r"visual.proj is \(32, 17\), the configured model needs \(32, 16\)"),
    ("visual.proj", None, "lacks visual.proj"),
    ("visual.extra", torch.zeros(1), "has unknown visual.extra"),
    ("visual.positional_embedding", torch.zeros(7, 32), r"\(7, 32\), the configured model needs \(17, 32\)"),
]


@pytest.mark.parametrize(("name", "value", "reason"), CLIP_FAULTS)
def test_weights_that_do_not_fit_are_refused_with_both_shapes(name, value, reason, tmp_path):
    torch.save(faulty(clip_state(check_arch(VIT)), name, value), tmp_path / "clip.pt")
    with pytest.raises(ModelError, match=reason) as caught:
        build_models(tiny_spec(), str(tmp_path / "clip.pt"))
    assert "\n" not in str(caught.value) and "clip.pt" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("name", ["clip.pt", "clip.safetensors"])
def test_an_unreadable_file_is_refused_in_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read as weights") as caught:
        build_models(tiny_spec(), str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"weight": Path("/")}, tmp_path / "clip.pt")
    with pytest.raises(ModelError, match="pickled objects other than tensors"):
        build_models(tiny_spec(), str(tmp_path / "clip.pt"))
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="holds no state dict"):
        build_models(tiny_spec(), str(tmp_path / "list.pt"))


PRETRAINED_FAULTS = [
    ("ViT-B-16-quickgelu", "opnai", "'opnai': no such file or run folder, and no such weights .* known: openai, dfn2b"),
    ("ViT-B-16-quickgelu", "runs/clip.pt", "'runs/clip.pt': no such file"),
    ("ViT-B-16", "openai", "trained with QuickGELU, .* set model.arch=ViT-B-16-quickgelu"),
    ("ViT-B-32-quickgelu", "laion2b_e16", "no such weights|set model.arch=ViT-B-32"),
    (VIT, "openai", "no such weights of .*tiny_vit.json in open_clip; known: none"),
]


@pytest.mark.parametrize(("arch", "pretrained", "reason"), PRETRAINED_FAULTS)
def test_impossible_pretrained_weights_are_known_before_anything_is_built(arch, pretrained, reason):
    with pytest.raises(ModelError, match=reason) as caught:
        check_tag(pretrained, arch, check_arch(arch))
    assert "\n" not in str(caught.value)


def test_a_download_without_network_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known\nand a long story")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", offline)
    spec = model_spec(ARCH["rn50"])
    check_tag("openai", spec.arch, spec.arch_config)
    with pytest.raises(ModelError, match="could not be downloaded .*; without a network give") as caught:
        build_models(spec, "openai")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_weights_by_tag_come_through_open_clips_download(monkeypatch):
    asked = []

    def download(model_id, filename=None, **kwargs):
        asked.append(model_id)
        return str(clip_file("rn50"))

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", download)
    monkeypatch.setattr(download_module, "_network_fault", lambda entry: "")
    golden, case = read_case("rn50_256x128")
    model, *_ = build_models(case_spec(case, "rn50"), "openai")
    assert asked == ["timm/resnet50_clip.openai"]
    with torch.no_grad():
        features = model.eval().features(case_images(case["images"], case["n"], case)[:2])
    within(scaled_error(features.proj, golden["eval_f_proj"][:2]), 2e-5)


# --- our own file


@pytest.mark.parametrize(
    "part", [{"training": {"settings": ["x"]}}, {"training": "x"}, {"decision": [1]}, {"spec": None}]
)
def test_a_card_that_this_system_does_not_write_is_one_line(part, tmp_path):
    spec = tiny_spec()
    metadata = card_of(spec).to_metadata()
    ((name, text),) = metadata.items()
    save_file({"x": torch.zeros(1)}, path := tmp_path / "odd.safetensors", {name: json.dumps(json.loads(text) | part)})
    with pytest.raises(DamagedError, match="its card is not as this system writes it") as caught:
        read_card(path)
    assert "\n" not in str(caught.value)


def card_of(spec):
    return ModelCard(spec, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), ("img",))


@pytest.mark.parametrize("arch", [VIT, RESNET])
def test_a_saved_model_stands_alone(arch, tmp_path):
    """Its file gives back the same outputs and card, for an architecture whose JSON file is gone."""
    copy = tmp_path / "mine.json"
    copy.write_text(Path(arch).read_text())
    sie = {"sie": "camera+view", "cameras": 3, "views": 2, "stride": 6} if arch == VIT else {}
    spec = tiny_spec(str(copy), noun="red car", prompt_tokens=2, **sie)
    models = build_models(spec, seed=5)
    models[0].train()(tiny_images())  # running statistics are part of the model
    path = tmp_path / "model.safetensors"
    save_model(path, models, card_of(spec))
    copy.unlink()

    model, loaded = load_model(path)
    assert loaded == spec and read_card(path) == card_of(spec) and not model.training
    assert equal(outputs(load_models(path)), outputs(models))
    for name, value in models[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert weights_file(tmp_path) == weights_file(path) == path


def test_a_loaded_model_trains_what_a_built_one_trains(tmp_path):
    models = build_models(tiny_spec())
    save_model(tmp_path / "model.safetensors", models, card_of(tiny_spec()))
    loaded = load_model(tmp_path / "model.safetensors")[0], load_text(tmp_path / "model.safetensors")
    for ours, theirs in zip(models[:2], loaded, strict=True):
        assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
            n: p.requires_grad for n, p in theirs.named_parameters()
        }


def test_a_model_saved_without_its_text_side_has_none(tmp_path):
    models = build_models(tiny_spec())
    save_model(tmp_path / "model.safetensors", models._replace(text=None), card_of(tiny_spec()))
    assert load_text(tmp_path / "model.safetensors") is None
    assert load_model(tmp_path / "model.safetensors")[1] == tiny_spec()


def test_files_that_are_not_ours_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no such run folder or file"):
        load_model(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="not a run folder, or the run has not finished"):
        weights_file(tmp_path)
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="was not written by this system"):
        load_model(tmp_path / "model.safetensors")
    models = build_models(tiny_spec())
    save_model(tmp_path / "model.safetensors", models._replace(text=None), card_of(tiny_spec()))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="is not a complete .safetensors file"):
        load_model(tmp_path / "model.safetensors")


# --- the authors' checkpoints


def official_state(case, net, noun="person"):
    """A checkpoint as the authors' code writes it, of the recipe's values: flat, its positions resized."""
    clip = clip_state(check_arch(ARCH[net]))
    classes, rows = case["classes"], case.get("cv_rows", 0)
    state = {f"image_encoder.{n.removeprefix('visual.')}": v for n, v in clip.items() if n.startswith("visual.")}
    positions = "image_encoder.attnpool.positional_embedding" if net == "rn50" else "image_encoder.positional_embedding"
    stride = case.get("stride", 16)
    grid = ((case["height"] - 16) // stride + 1, (case["width"] - 16) // stride + 1)
    cells = state[positions][1:]
    side = int(len(cells) ** 0.5)
    resized = F.interpolate(cells.T.reshape(1, -1, side, side), size=grid, mode="bilinear")[0].flatten(1).T
    state[positions] = torch.cat([state[positions][:1], resized])
    text_names = ("transformer.", "ln_final.", "positional_embedding", "text_projection")
    state |= {f"text_encoder.{n}": v for n, v in clip.items() if n.startswith(text_names)}
    words = clip["token_embedding.weight"][template_ids(noun, 4, 77)[0]]
    state["prompt_learner.cls_ctx"] = seeded("reid.prompt_tokens", (classes, 4, 512))
    state["prompt_learner.token_prefix"], state["prompt_learner.token_suffix"] = words[None, :5], words[None, 9:]
    width, projected = (2048, 1024) if net == "rn50" else (768, 512)
    for neck, size in (("bottleneck", width), ("bottleneck_proj", projected)):
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{neck}.{part}"] = seeded(f"reid.{neck}.{part}", (size,))
    state["classifier.weight"] = seeded("reid.classifier.weight", (classes, width))
    state["classifier_proj.weight"] = seeded("reid.classifier_proj.weight", (classes, projected))
    if rows:
        state["cv_embed"] = seeded("reid.cv_embed", (rows, 768))
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "net", "prefix"), [("vit_s12_256x128_cam", "vit", "module."), ("rn50_256x128", "rn50", "")]
)
def test_an_official_checkpoint_gives_the_reference_descriptors(name, net, prefix, tmp_path):
    golden, case = read_case(name)
    state = official_state(case, net)
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "official.pth")
    path = tmp_path / "official.pth"
    shapes = official_shapes(read_state_dict(path), str(path))
    assert (shapes.identities, shapes.sie_rows) == (10, case.get("cv_rows", 0))

    model, text, tables = build_models(case_spec(case, net), str(tmp_path / "official.pth"))
    images = case_images(case["images"], case["n"], case)
    cameras = torch.tensor(case["cams"]) if "cams" in case else None
    with torch.no_grad():
        output = model.eval()(images, cameras)
    joined = torch.cat([output.features.img, output.features.proj], dim=1)
    within(scaled_error(joined[:2], golden["eval_descriptor"]), 2e-5)
    within(scaled_error(descriptor(output.features, ("img", "proj")), F.normalize(joined).numpy()), 1e-6)
    for neck, table, name in zip(output.necks, tables.classifiers, ("img", "proj"), strict=True):
        within(scaled_error(neck @ table.block.T, golden[f"eval_score_{name}"]), 2e-5)
    texts, text_case = read_case("text_person_512" if net == "vit" else "text_person_1024")
    assert tables.tokens.block.shape == (10, 4, 512)
    with torch.no_grad():
        tokens = seeded("reid.prompt_tokens", (text_case["classes"], 4, 512))
        within(scaled_error(text(tokens[text_case["labels"]]), texts["text_features"]), 2e-5)


def authors_names(spec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' model for a ViT, written out from their code's structure."""
    config = spec.arch_config
    vision, words, projected = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    width, text_width, patch = vision["width"], words["width"], vision["patch_size"]
    names = {
        "image_encoder.class_embedding": (width,),
        "image_encoder.positional_embedding": (1 + spec.grid[0] * spec.grid[1], width),
        "image_encoder.proj": (width, projected),
        "image_encoder.conv1.weight": (width, 3, patch, patch),
        "text_encoder.positional_embedding": (77, text_width),
        "text_encoder.text_projection": (text_width, projected),
        "prompt_learner.cls_ctx": (spec.identities, spec.prompt_tokens, text_width),
        "prompt_learner.token_prefix": (1, 5, text_width),
        "prompt_learner.token_suffix": (1, 72 - spec.prompt_tokens, text_width),
        "classifier.weight": (spec.identities, width),
        "classifier_proj.weight": (spec.identities, projected),
        "cv_embed": (spec.sie_rows, width),
    }
    for neck, size in (("bottleneck", width), ("bottleneck_proj", projected)):
        names |= {f"{neck}.{part}": (size,) for part in ("weight", "bias", "running_mean", "running_var")}
        names[f"{neck}.num_batches_tracked"] = ()
    for norm, size in (("image_encoder.ln_pre", width), ("image_encoder.ln_post", width)):
        names |= {f"{norm}.weight": (size,), f"{norm}.bias": (size,)}
    names |= {f"text_encoder.ln_final.{part}": (text_width,) for part in ("weight", "bias")}
    towers = (("image_encoder", width, vision), ("text_encoder", text_width, words))
    for tower, size, part in towers:
        hidden = int(size * part.get("mlp_ratio", 4.0))
        for layer in range(part["layers"]):
            block = f"{tower}.transformer.resblocks.{layer}"
            names |= {f"{block}.{ln}.{kind}": (size,) for ln in ("ln_1", "ln_2") for kind in ("weight", "bias")}
            names |= {f"{block}.attn.in_proj_weight": (3 * size, size), f"{block}.attn.in_proj_bias": (3 * size,)}
            names |= {f"{block}.attn.out_proj.weight": (size, size), f"{block}.attn.out_proj.bias": (size,)}
            names |= {f"{block}.mlp.c_fc.weight": (hidden, size), f"{block}.mlp.c_fc.bias": (hidden,)}
            names |= {f"{block}.mlp.c_proj.weight": (size, hidden), f"{block}.mlp.c_proj.bias": (size,)}
    return names


def official_tiny(tmp_path, **changes):
    spec = tiny_spec(**{"sie": "camera", "cameras": 3, "stride": 6, **changes})
    models = build_models(spec, seed=3)
    save_official(tmp_path / "official.pth", models.state_dict(), spec)
    return spec, models, tmp_path / "official.pth"


def test_export_writes_the_authors_names_and_shapes(tmp_path, capsys):
    """From a run folder; and the file gives the run's outputs when read again."""
    spec = tiny_spec(sie="camera", cameras=3, stride=6)
    models = build_models(spec, seed=3)
    save_model(tmp_path / "model.safetensors", models, card_of(spec))
    out = tmp_path / "official.pth"
    export.main(["--weights", str(tmp_path), "--format", "official", "--out", str(out)])
    assert "image and text side" in capsys.readouterr().out
    state = torch.load(out, weights_only=True)
    assert {name: tuple(value.shape) for name, value in state.items()} == authors_names(spec)
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    assert equal(outputs(build_models(spec, str(out))), outputs(models))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "official.pth"]


def test_export_reads_a_run_from_a_url(tmp_path):
    models = build_models(tiny_spec(), seed=3)
    save_model(tmp_path / "model.safetensors", models, card_of(tiny_spec()))
    with storage.write_atomic("memory://export/run/model.safetensors") as file:
        file.write((tmp_path / "model.safetensors").read_bytes())
    export.main(["--weights", "memory://export/run", "--format", "official", "--out", str(tmp_path / "out.pth")])
    assert equal(outputs(build_models(tiny_spec(), str(tmp_path / "out.pth"))), outputs(models))


@pytest.mark.parametrize(
    ("weights", "out", "reason"),
    [
        ("none", "out.pth", "none: no such run folder or file of weights"),
        ("other.pth", "out.pth", "other.pth: give a run folder or its model.safetensors; such a file is no run's"),
        ("none", ".", "is a folder; name a file in it"),
        ("none", "nowhere/out.pth", "nowhere/out.pth: no such folder"),
        ("memory://nowhere", "out.pth", "memory://nowhere/model.safetensors: no such file"),
    ],
)
def test_export_refuses_what_it_cannot_do_in_one_line(weights, out, reason, tmp_path, capsys, monkeypatch):
    (tmp_path / "other.pth").touch()
    monkeypatch.chdir(tmp_path)
    arguments = ["--weights", weights, "--format", "official", "--out", out]
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    try:
        code = cli.run(export.main)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and reason in error and error.startswith("error: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.pth"]


def test_an_export_onto_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        with pytest.raises(OSError, match="No space left") as caught:
            save_official(disk / "out.pth", build_models(tiny_spec()).state_dict(), tiny_spec())
        assert caught.value.filename == str(disk / "out.pth")
        assert not list(disk.iterdir())


MISFITS = [
    ({"stride": 8}, r"positional_embedding is \(36, 32\), the configuration needs \(25, 32\): .*48x32 with stride 8"),
    ({"identities": 6}, r"classifier.weight is \(5, 32\), the configuration needs \(6, 32\)"),
    ({"cameras": 4}, r"cv_embed is \(3, 32\), the configuration needs \(4, 32\): model.sie is camera for 4 cameras"),
    ({"sie": "none"}, r"cv_embed is \(3, 32\), the configuration needs none: model.sie is none"),
    ({"prompt_tokens": 8}, r"prompt_learner.cls_ctx is \(5, 4, 16\), the configuration needs \(5, 8, 16\)"),
    (
        {"noun": "small red vehicle"},
        "its prompts end at position 11, those for noun 'small red vehicle' at position 13",
    ),
]


def used(spec, path):
    """A checkpoint as evaluation and extraction take it: whole. What a run takes over is in tests/runs."""
    model, text = empty_models(spec)
    return load_official(model, text, read_state_dict(path), spec, str(path))


@pytest.mark.parametrize(("changes", "reason"), MISFITS)
def test_an_official_checkpoint_that_does_not_fit_is_refused_with_both_shapes(changes, reason, tmp_path):
    spec, _, path = official_tiny(tmp_path)
    with pytest.raises(ModelError, match=reason) as caught:
        used(dataclasses.replace(spec, **changes), path)
    assert "\n" not in str(caught.value) and "official.pth" in str(caught.value)


def test_a_checkpoint_without_side_information_does_not_fit_a_model_with(tmp_path):
    spec, _, path = official_tiny(tmp_path, sie="none")
    with pytest.raises(ModelError, match=r"cv_embed is missing, the configuration needs \(3, 32\)"):
        used(dataclasses.replace(spec, sie="camera"), path)


def test_equal_row_counts_of_other_image_shapes_follow_the_configuration(tmp_path):
    """48x32 and 32x48 have as many rows: shapes cannot tell, so both are accepted."""
    spec, _, path = official_tiny(tmp_path, stride=8, image_size=(48, 32))
    model, *_ = build_models(dataclasses.replace(spec, image_size=(32, 48)), str(path))
    model.features(torch.zeros(1, 3, 32, 48))


def test_a_baselines_checkpoint_has_no_text_side(tmp_path):
    spec, models, path = official_tiny(tmp_path)
    state = torch.load(path, weights_only=True)
    text = ("prompt_learner.", "text_encoder.")
    torch.save({name: value for name, value in state.items() if not name.startswith(text)}, path)
    model, text, tables = build_models(spec, str(path))
    assert text is None and tables.tokens is None and not holds_prompts(path)
    assert equal(model.eval().features(tiny_images()), models[0].eval().features(tiny_images()))


def test_a_file_of_ours_says_itself_what_it_computes(tmp_path):
    """A run's weights of a model with GELU start one with GELU, and none with QuickGELU."""
    arch = "ViT-B-32"
    config = check_arch(VIT)
    spec = dataclasses.replace(tiny_spec(), arch=arch)
    models = build_models(spec, seed=3)
    save_model(tmp_path / "model.safetensors", models, card_of(spec))
    assert equal(outputs(build_models(spec, str(tmp_path / "model.safetensors"))), outputs(models))
    quick = dataclasses.replace(spec, arch=f"{arch}-quickgelu", arch_config=config | {"quick_gelu": True})
    with pytest.raises(ModelError, match="trained with GELU, but .* computes QuickGELU: set model.arch=ViT-B-32"):
        build_models(quick, str(tmp_path / "model.safetensors"))


def test_official_weights_need_quickgelu(tmp_path):
    """ViT-B-16 computes GELU, the authors' model QuickGELU: neither way is passed in silence."""
    arch = "ViT-B-16"
    spec = model_spec(arch)
    with pytest.raises(ModelError, match="model.arch=ViT-B-16-quickgelu"):
        save_official(tmp_path / "out.pth", nn.Linear(1, 1).state_dict(), spec)
    state = {"image_encoder.proj": torch.zeros(1), "classifier.weight": torch.zeros(1, 1)}
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(ModelError, match="model.arch=ViT-B-16-quickgelu"):
        build_models(spec, str(tmp_path / "in.pth"))


def test_an_official_checkpoint_with_another_bit_is_refused_in_one_line_or_reads_the_same(tmp_path):
    path = tmp_path / "official.pth"
    expected = {"classifier.weight": torch.randn(8, 16), "bottleneck.weight": torch.randn(16)}
    torch.save(expected, path)
    content = path.read_bytes()
    for changed in flips(content, 200):
        path.write_bytes(changed)
        try:
            found = read_state_dict(path)
        except ModelError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
