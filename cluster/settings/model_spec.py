"""From settings and dataset to the model's specification; no weights, no torch."""

from pathlib import Path

from clipreid.model.arch import check_arch
from clipreid.model.spec import ModelSpec
from cluster.settings.config import Config
from shards.loading.index import ShardIndex

ROOT = Path(__file__).resolve().parents[2]


def model_spec(config: Config, index: ShardIndex) -> ModelSpec:
    """For the dataset to train on. Raises ModelError where architecture, sizes or side information do not fit."""
    return configured_spec(
        config, cameras=index.cameras, views=index.views, identities=index.split("train").num_identities,
        noun=index.noun,
    )  # fmt: skip


def configured_spec(config: Config, *, cameras: int, views: int, identities: int, noun: str) -> ModelSpec:
    """For any dataset of that many cameras, views and training identities. Raises ModelError as `model_spec`."""
    m = config.model
    return ModelSpec(
        arch=m.arch,
        arch_config=check_arch(_place_of(m.arch)),
        image_size=m.image_size,
        stride=m.stride,
        sie=m.sie,
        sie_tokens=m.sie_tokens,
        sie_coefficient=m.sie_coefficient,
        cameras=cameras,
        views=views,
        identities=identities,
        prompt_tokens=m.prompt_tokens,
        noun=noun,
    )


def _place_of(arch: str) -> str:
    """A JSON file's path starts at the working folder or, for the files shipped in configs/, at the project's root."""
    shipped = ROOT / arch
    return str(shipped) if arch.endswith(".json") and not Path(arch).exists() and shipped.exists() else arch
