"""What a re-identification model is made of: the sizes and choices from which it can be built again.

    settings, dataset ──▶ [spec] ──▶ model ──▶ model.safetensors

No weights and no torch: the specification is made where the run is planned, travels to the workers, and is written
beside the final weights so that a file of weights stands alone.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from clipreid.errors import ModelError
from clipreid.model.arch import check_arch_config, is_resnet

Sie = Literal["none", "camera", "view", "camera+view"]
"""Side information (TransReID's SIE): what of an image is embedded and added to its tokens."""
SieTokens = Literal["cls", "all"]
"""Tokens that side information is added to (Tab 7)."""
FeatureName = Literal["pre", "img", "proj"]
"""The features that an encoder gives, see `encoders.Features`."""
RESNET_STRIDE = 16
"""Pixels per cell of a ModifiedResNet's last map, whose last stage keeps stride 1."""


@dataclass(frozen=True)
class ModelSpec:
    """Everything that fixes the shapes of a ReIDModel and its prompts. Raises ModelError when it does not fit."""

    arch: str
    """open_clip model name, or the path of the JSON configuration it came from (for messages; not read again)."""
    arch_config: dict[str, Any]
    """open_clip-style model configuration, as `clipreid.model.arch.check_arch` returns it."""
    image_size: tuple[int, int]
    """Height, width in pixels."""
    stride: int | None
    """Pixels between patches of a ViT; None = its patch size (no overlap). 12 is the paper's OLP for patch 16."""
    sie: Sie
    sie_tokens: SieTokens
    sie_coefficient: float
    """Factor on the rows of the side information table."""
    cameras: int
    """Cameras in the training dataset: rows of the side information table."""
    views: int
    """Views in the training dataset: rows of the side information table."""
    identities: int
    """N, training identities: rows of the classifiers and sets of prompt tokens."""
    prompt_tokens: int
    """M, learnable tokens per identity (Tab 10)."""
    noun: str
    """Last word or words of the prompt."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(self.image_size))
        check_arch_config(self.arch_config, self.arch)
        if self.sie not in get_args(Sie):
            raise ModelError(f"model.sie is {self.sie!r}; known: {', '.join(get_args(Sie))}")
        if self.sie_tokens not in get_args(SieTokens):
            raise ModelError(f"model.sie_tokens is {self.sie_tokens!r}; known: {', '.join(get_args(SieTokens))}")
        for name, value in (("identities", self.identities), ("model.prompt_tokens", self.prompt_tokens)):
            if value < 1:
                raise ModelError(f"{name} is {value}, it must be at least 1")
        if self.sie != "none" and self.sie_rows < 1:
            raise ModelError(
                f"model.sie is {self.sie}, the dataset has {self.cameras} cameras and {self.views} views: "
                "set model.sie=none or pack the dataset with them"
            )
        (self._check_resnet if self.is_resnet else self._check_vit)()

    @property
    def is_resnet(self) -> bool:
        return is_resnet(self.arch_config)

    @property
    def patch_size(self) -> int:
        """Pixels per side of a ViT's patch; the ModifiedResNet's counterpart is its stride."""
        return RESNET_STRIDE if self.is_resnet else self.arch_config["vision_cfg"]["patch_size"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows, columns of the patch grid: (H - patch) // stride + 1, and likewise for the width."""
        stride = self.stride or self.patch_size
        height, width = self.image_size
        return (height - self.patch_size) // stride + 1, (width - self.patch_size) // stride + 1

    @property
    def sie_rows(self) -> int:
        """Rows of the side information table; 0 without side information."""
        rows = {
            "none": 0,
            "camera": self.cameras,
            "view": self.views,
            "camera+view": self.cameras * self.views,
        }
        return rows[self.sie]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        return asdict(self) | {"image_size": list(self.image_size)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelSpec":
        return cls(**fields)

    def _check_vit(self) -> None:
        patch = self.patch_size
        if self.stride is not None and not 1 <= self.stride <= patch:
            raise ModelError(f"model.stride is {self.stride}; it must lie between 1 and the patch size {patch}")
        if min(self.image_size) < patch:
            raise ModelError(
                f"model.image_size {_by(self.image_size)} is smaller than a patch of {self.arch} ({patch})"
            )

    def _check_resnet(self) -> None:
        if self.sie != "none":
            raise ModelError(f"model.sie is {self.sie}, but {self.arch} is a ResNet: side information needs a ViT")
        if self.stride not in (None, RESNET_STRIDE):
            raise ModelError(f"model.stride is {self.stride}, but {self.arch} is a ResNet: leave it out")
        if any(size < 16 or size % 16 for size in self.image_size):
            raise ModelError(f"model.image_size {_by(self.image_size)}: a ResNet needs multiples of 16 pixels")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
