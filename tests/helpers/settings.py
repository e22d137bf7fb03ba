"""What the method is set to where a test names nothing else: the values of the published runs."""

from clipreid.augment import AugmentSettings
from clipreid.loss_settings import LossSettings
from clipreid.model.arch import check_arch
from clipreid.model.spec import ModelSpec


def model_spec(arch, **changes) -> ModelSpec:
    """For one identity seen by one camera."""
    fields = {
        "image_size": (256, 128),
        "stride": None,
        "sie": "none",
        "sie_tokens": "cls",
        "sie_coefficient": 1.0,
        "cameras": 1,
        "views": 1,
        "identities": 1,
        "prompt_tokens": 4,
        "noun": "person",
    }
    return ModelSpec(arch=arch, arch_config=check_arch(arch), **(fields | changes))


def loss_settings(**changes) -> LossSettings:
    fields = {
        "id_weight": 0.25,
        "triplet_weight": 1.0,
        "text_weight": 1.0,
        "label_smoothing": 0.1,
        "margin": 0.3,
        "text_loss": "i2tce",
        "triplet_levels": 3,
    }
    return LossSettings(**(fields | changes))


def augment_settings(**changes) -> AugmentSettings:
    fields = {"flip": 0.5, "pad": 10, "erase": 0.5, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return AugmentSettings(**(fields | changes))
