"""Full-size models filled by the recipe of tests/golden/README.md, for every test that compares with its figures.

The recipe's weights go through a file and `build_models`, the way that real weights come in.
"""

import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

from clipreid.model.arch import check_arch
from clipreid.model.clip_library import open_clip
from clipreid.model.spec import ModelSpec
from clipreid.weights.initial import Models, build_models
from tests.golden.seeded import seeded_images, seeded_tensor
from tests.helpers.settings import model_spec

GOLDEN = Path(__file__).parents[1] / "golden"
ROOT_CONFIGS = Path(__file__).parents[2] / "configs" / "models"
ARCH = {"vit": "ViT-B-16-quickgelu", "rn50": "RN50-quickgelu"}


@cache
def read_case(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and parameters of a reference file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("case_json")))


def seeded(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(seeded_tensor(name, shape))


def case_images(tag: str, count: int, case: dict) -> torch.Tensor:
    return torch.from_numpy(seeded_images(tag, count, case["height"], case["width"]))


def clip_state(arch_config: dict) -> dict[str, torch.Tensor]:
    """The recipe's CLIP weights at their native size, in OpenAI's names."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in open_clip.CLIP(**arch_config).state_dict().items()}
    skip = ("logit_scale", "num_batches_tracked")
    return {name: seeded(name, shape) for name, shape in shapes.items() if not name.endswith(skip)}


@cache
def clip_file(net: str) -> Path:
    """A file of the recipe's weights for net "vit" or "rn50", made once per process, to be given as `pretrained`."""
    path = Path(_folder().name) / f"{net}.pt"
    torch.save(clip_state(check_arch(ARCH[net])), path)
    return path


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="golden-clip-")  # removed when the process ends


def case_spec(case: dict, net: str, noun: str = "person") -> ModelSpec:
    """The ModelSpec of a reference file's parameters."""
    rows, views = case.get("cv_rows", 0), case.get("n_views", 1)
    return model_spec(
        ARCH[net],
        image_size=(case.get("height", 256), case.get("width", 128)),
        stride=case.get("stride"),
        sie="none" if not rows else "camera+view" if views > 1 else "camera",
        cameras=max(rows // views, 1),
        views=views,
        identities=case["classes"],
        noun=noun,
    )


def case_models(spec: ModelSpec, net: str) -> Models:
    """All of `spec` with the recipe's CLIP weights, read from a file, and its heads and tables."""
    models = build_models(spec, str(clip_file(net)))
    fill_heads(models)
    return models


@torch.no_grad()
def fill_heads(models: Models) -> None:
    """Replace what re-identification adds to CLIP by the recipe's values."""
    for name, value in models.model.state_dict().items():
        if not name.startswith("image_encoder.") and not name.endswith("num_batches_tracked"):
            value.copy_(seeded(f"reid.{name}", tuple(value.shape)))
    for table in models.tables:
        name = "prompt_tokens" if table is models.tables.tokens else table.name
        table.block.copy_(seeded(f"reid.{name}", tuple(table.block.shape)))


def scaled_error(value: torch.Tensor, reference: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute reference value."""
    reference = torch.from_numpy(np.asarray(reference, dtype=np.float64))
    return float((value.detach().double() - reference).abs().max() / reference.abs().max())
