"""Which CLIP architectures can be re-identified with, read from their configuration alone.

    model.arch ──▶ [arch] ──▶ spec ──▶ model

In:  an open_clip model name, or the path of a JSON file in open_clip's model-configuration format.
Out: that configuration as a dict; nothing is built, and neither torch nor open_clip is imported, so that a mistyped
     name shows before any worker starts.

Accepted are models with a class-token ViT or a ModifiedResNet as image tower and CLIP's causal text tower with CLIP's
tokenizer: prompts are cut at the end token, which only a causal tower permits.
"""

import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any

from clipreid.errors import ModelError

MOST_FILE_BYTES = 1_000_000
MOST_SIZE = 16_384
"""Of a width, a number of layers, a picture's side: several times those of the largest models."""
VOCABULARY = 49408
"""Entries of CLIP's byte-pair vocabulary, which ships inside open_clip."""

_TOP_KEYS = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_bias"}
_VISION_KEYS = {
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"),
    *("ls_init_value", "no_ln_pre", "act_kwargs", "norm_kwargs"),
}
_TEXT_KEYS = {
    *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
    *("ls_init_value", "act_kwargs", "norm_kwargs", "pool_type", "eos_id"),
}
# Options of open_clip that this system does not have, with the value at which they do nothing.
_VISION_NEUTRAL = {
    **{"pool_type": "tok", "attentional_pool": False, "final_ln_after_pool": False, "patch_dropout": 0.0},
    **{"output_tokens": False, "pos_embed_type": "learnable"},
}
_TEXT_NEUTRAL = {
    **{"no_causal_mask": False, "embed_cls": False, "output_tokens": False},
    **{"proj_type": "linear", "proj_bias": False},
}


def check_arch(arch: str) -> dict[str, Any]:
    """Look an architecture up and check that the method can use it, without building it.

    `arch` is an open_clip model name ("ViT-B-16-quickgelu") or the path of a JSON model configuration.
    Returns the configuration: `embed_dim`, `vision_cfg`, `text_cfg` and maybe `quick_gelu`.
    Raises ModelError, one line, when there is no such model, or it is of an unsupported kind.
    """
    config = _read_file(Path(arch)) if _is_path(arch) else _read_named(arch)
    check_arch_config(config, arch)
    return config


def check_arch_config(config: dict[str, Any], arch: str) -> None:
    """Raise ModelError when the method cannot use the model of this configuration; `arch` names it in the message."""
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in config:
            raise ModelError(f"model.arch {arch}: the model configuration has no {key!r}")
    if "multimodal_cfg" in config:
        raise ModelError(f"model.arch {arch}: is a CoCa model; {_REMEDY}")
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        raise ModelError(f"model.arch {arch}: its image tower is timm's {vision['timm_model_name']}; {_REMEDY}")
    if "hf_model_name" in text:
        raise ModelError(f"model.arch {arch}: its text tower is Hugging Face's {text['hf_model_name']}; {_REMEDY}")
    if text.get("no_causal_mask"):
        raise ModelError(f"model.arch {arch}: its text tower is not causal (no_causal_mask); {_REMEDY}")
    if "hf_tokenizer_name" in text or "tokenizer_kwargs" in text:
        tokenizer = text.get("hf_tokenizer_name", text.get("tokenizer_kwargs"))
        raise ModelError(f"model.arch {arch}: its tokenizer is {tokenizer}, not CLIP's; {_REMEDY}")
    if text.get("pool_type", "argmax") not in ("argmax", "eos"):
        raise ModelError(f"model.arch {arch}: its text feature is not taken at the end token; {_REMEDY}")
    _check_keys(arch, "", config, _TOP_KEYS, {})
    _check_keys(arch, "vision_cfg.", vision, _VISION_KEYS, _VISION_NEUTRAL)
    _check_keys(arch, "text_cfg.", text, _TEXT_KEYS, _TEXT_NEUTRAL)
    _check_sizes(arch, config)


_REMEDY = "use one with a class-token ViT or ModifiedResNet and CLIP's causal text tower (ViT-B-16-quickgelu)"


def check_tag(pretrained: str, arch: str, config: dict[str, Any]) -> None:
    """Raise ModelError unless `model.pretrained`, which is no file, is a tag of open_clip's that fits the model.

    Imports open_clip (seconds). Downloads nothing.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    entry = get_pretrained_cfg(arch, pretrained)
    if not entry:
        tags = ", ".join(list_pretrained_tags_by_model(arch)) or "none"
        raise ModelError(
            f"model.pretrained {pretrained!r}: no such file or run folder, and no such weights of {arch} in "
            f"open_clip; known: {tags}"
        )
    check_activation(pretrained, bool(entry.get("quick_gelu")), arch, config)


def check_activation(pretrained: str, quick_gelu: bool, arch: str, config: dict[str, Any]) -> None:
    """Raise ModelError unless the model computes the activation its weights were trained with: else it is 1e-2 off."""
    model = bool(config.get("quick_gelu"))
    if model != quick_gelu:
        kinds = {True: "QuickGELU", False: "GELU"}
        other = arch.removesuffix("-quickgelu") if model else f"{arch}-quickgelu"
        remedy = '"quick_gelu" in that file' if arch.endswith(".json") else f"model.arch={other}"
        raise ModelError(
            f"model.pretrained {pretrained!r} was trained with {kinds[quick_gelu]}, but model.arch {arch} computes "
            f"{kinds[model]}: set {remedy}"
        )


def is_resnet(config: dict[str, Any]) -> bool:
    """Whether the image tower is a ModifiedResNet; otherwise it is a ViT."""
    return isinstance(config["vision_cfg"]["layers"], list | tuple)


def _is_path(arch: str) -> bool:
    return arch.endswith(".json") or "/" in arch


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"model.arch {path}: no such file; give an open_clip model name or a JSON model configuration")
    try:
        if (size := path.stat().st_size) > MOST_FILE_BYTES:
            raise ValueError(f"{size:,} bytes, more than {MOST_FILE_BYTES:,}")
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model.arch {path}: is not valid JSON: {error}") from None
    tables = [config]
    if isinstance(config, dict):
        tables += [config.get("vision_cfg", {}), config.get("text_cfg", {})]
    if not all(isinstance(table, dict) for table in tables):
        raise ModelError(f"model.arch {path}: is not a model configuration with embed_dim, vision_cfg and text_cfg")
    return config


def _read_named(arch: str) -> dict[str, Any]:
    folder = _open_clip_configs()
    path = folder / f"{arch}.json"
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    names = sorted(entry.stem for entry in folder.glob("*.json"))
    near = difflib.get_close_matches(arch, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
    raise ModelError(f"model.arch {arch!r}: open_clip has no such model, and it is not a .json file; {hint}")


def _open_clip_configs() -> Path:
    # find_spec locates the package without importing it: the import takes seconds, this microseconds.
    found = importlib.util.find_spec("open_clip")
    assert found is not None and found.submodule_search_locations, "open_clip_torch is a dependency of this package"
    return Path(found.submodule_search_locations[0]) / "model_configs"


def _check_keys(arch: str, where: str, given: dict[str, Any], known: set[str], neutral: dict[str, Any]) -> None:
    for key, value in given.items():
        if key in neutral:
            if value != neutral[key]:
                raise ModelError(f"model.arch {arch}: {where}{key} = {value!r} is not supported, only {neutral[key]!r}")
        elif key not in known:
            raise ModelError(f"model.arch {arch}: unknown key {where}{key}; known: {', '.join(sorted(known))}")


def _check_sizes(arch: str, config: dict[str, Any]) -> None:
    vision, text = config["vision_cfg"], config["text_cfg"]
    resnet = isinstance(vision.get("layers"), list | tuple)
    required = {
        "embed_dim": config["embed_dim"],
        **{f"vision_cfg.{key}": vision.get(key) for key in ("width", "image_size")},
        **{f"text_cfg.{key}": text.get(key) for key in ("context_length", "width", "heads", "layers")},
    }
    if resnet:
        required |= {f"vision_cfg.layers[{i}]": count for i, count in enumerate(vision["layers"])}
    else:
        required |= {f"vision_cfg.{key}": vision.get(key) for key in ("layers", "patch_size")}
    if "head_width" in vision:
        required["vision_cfg.head_width"] = vision["head_width"]
    for key, value in required.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_SIZE:
            raise ModelError(f"model.arch {arch}: {key} must be a whole number from 1 to {MOST_SIZE}, not {value!r}")
    if resnet and len(vision["layers"]) != 4:
        raise ModelError(f"model.arch {arch}: vision_cfg.layers of a ResNet has four entries, not {vision['layers']}")
    if text.get("vocab_size") != VOCABULARY:
        raise ModelError(f"model.arch {arch}: text_cfg.vocab_size is {text.get('vocab_size')}, CLIP's is {VOCABULARY}")
    for table, name in ((vision, "vision_cfg"), (text, "text_cfg")):
        ratio = table.get("mlp_ratio", 4.0)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= MOST_SIZE:
            raise ModelError(f"model.arch {arch}: {name}.mlp_ratio must be a number above 0, not {ratio!r}")
    head_width = vision.get("head_width", 64)
    attended = vision["width"] * 32 if resnet else vision["width"]
    if attended % head_width:
        raise ModelError(f"model.arch {arch}: width {attended} is not a multiple of vision_cfg.head_width {head_width}")
    if text["width"] % text["heads"]:
        raise ModelError(
            f"model.arch {arch}: text_cfg.width {text['width']} is not a multiple of {text['heads']} heads"
        )
