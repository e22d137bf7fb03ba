"""Models and losses as in the published runs, for benchmarks that train."""

from clipreid.augment import AugmentSettings
from clipreid.loss_settings import LossSettings
from clipreid.model.arch import check_arch
from clipreid.model.spec import ModelSpec

AUGMENT = AugmentSettings(flip=0.5, pad=10, erase=0.5, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
LOSSES = LossSettings(
    id_weight=0.25,
    triplet_weight=1.0,
    text_weight=1.0,
    label_smoothing=0.1,
    margin=0.3,
    text_loss="i2tce",
    triplet_levels=3,
)


def model_spec(arch: str, image_size: tuple[int, int], identities: int) -> ModelSpec:
    """Without side information and overlapping patches. Raises ModelError when sizes do not fit."""
    return ModelSpec(
        arch=arch,
        arch_config=check_arch(arch),
        image_size=image_size,
        stride=None,
        sie="none",
        sie_tokens="cls",
        sie_coefficient=1.0,
        cameras=1,
        views=1,
        identities=identities,
        prompt_tokens=4,
        noun="person",
    )
