"""From settings and dataset to the model's specification.

    Config, ShardIndex ──▶ [model_spec] ──▶ ModelSpec ──▶ clipreid's build_models

No torch, and of weights their card alone.
"""

from clipreid.model.arch import check_arch
from clipreid.model.spec import ModelSpec
from clipreid.weights.card import find_card, local_file
from cluster.settings.config import Config
from cluster.settings.paths import shipped_file
from shards.loading.index import ShardIndex


def model_spec(config: Config, index: ShardIndex) -> ModelSpec:
    """For the dataset to train on. Raises ModelError where architecture, sizes or side information do not fit."""
    identities = index.split("train").num_identities
    noun = _noun_of_weights(config.model.pretrained) or index.noun
    return configured_spec(config, cameras=index.cameras, views=index.views, identities=identities, noun=noun)


def _noun_of_weights(pretrained: str | None) -> str:
    """A file of ours holds the words of its prompts as vectors, and no others: a run that begins with it keeps them."""
    path = local_file(pretrained) if pretrained else None
    card = find_card(path) if path else None
    return card.spec.noun if card else ""


def configured_spec(config: Config, *, cameras: int, views: int, identities: int, noun: str) -> ModelSpec:
    """For any dataset of that many cameras, views and training identities. Raises ModelError as `model_spec`."""
    m = config.model
    return ModelSpec(
        arch=m.arch,
        arch_config=check_arch(shipped_file(m.arch)),
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
