"""The method, in plain single-process PyTorch: encoders, prompts, losses, schedules, augmentation, metrics.

Nothing here knows of process groups, Ray, DeepSpeed or tar files: what crosses ranks goes through `peers`, an argument.

It is also the name by which programs know the whole system, so `clipreid.load` and what belongs to it are found here.
They live above, in `cluster.library`, where method and data meet, and are looked up when they are asked for: whoever
imports a module of the method loads nothing of that.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.library import ReID, list_images, load

__all__ = ["ReID", "list_images", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cluster import library

    return getattr(library, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
