"""Settings of the model that a run takes from the weights it begins with.

    tree of settings ──▶ [of_weights] ──▶ the same over those of model.pretrained ──▶ Config

A file of ours says in its card what it was trained with. Whoever goes on from it need not repeat that: what the
settings leave open is as it was in that training. No torch, and of weights their card alone.
"""

from typing import Any

from clipreid.weights.card import ModelCard, find_card, local_file
from cluster.settings.paths import as_placed
from cluster.settings.yaml_file import merged

OF_MODEL = ("arch", "image_size", "stride", "sie", "sie_tokens", "sie_coefficient", "prompt_tokens")


def over_those_of_weights(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree, with what it does not say of the model from the card of `model.pretrained`, where that is a run or a
    file of ours. Raises ModelError for a folder that is no run's, and for a damaged file."""
    model = tree.get("model")
    pretrained = model.get("pretrained") if isinstance(model, dict) else None
    path = local_file(as_placed("model.pretrained", pretrained)) if isinstance(pretrained, str) else None
    card = find_card(path) if path else None
    return merged(_settings(card), tree) if card else tree


def _settings(card: ModelCard) -> dict[str, Any]:
    return {
        "data": {"pixel_mean": list(card.pixel_mean), "pixel_std": list(card.pixel_std)},
        "model": {name: getattr(card.spec, name) for name in OF_MODEL},
        "eval": {"descriptor": list(card.descriptor)},
    }
