"""From settings and dataset to the model's specification.

    Config, ShardIndex ──▶ [model_spec] ──▶ ModelSpec ──▶ clipreid's build_models

No weights, no torch.
"""

from clipreid.model.arch import check_arch
from clipreid.model.spec import ModelSpec
from cluster.settings.config import Config
from cluster.settings.paths import arch_file
from shards.loading.index import ShardIndex


def model_spec(config: Config, index: ShardIndex) -> ModelSpec:
    """For the dataset to train on. Raises ModelError where architecture, sizes or side information do not fit."""
    identities = index.split("train").num_identities
    return configured_spec(config, cameras=index.cameras, views=index.views, identities=identities, noun=index.noun)


def configured_spec(config: Config, *, cameras: int, views: int, identities: int, noun: str) -> ModelSpec:
    """For any dataset of that many cameras, views and training identities. Raises ModelError as `model_spec`."""
    m = config.model
    return ModelSpec(
        arch=m.arch,
        arch_config=check_arch(arch_file(m.arch)),
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
