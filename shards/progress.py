"""How a long task says how far it has come."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


def silent(done: int, total: int) -> None:
    """A `Progress` that shows nothing."""
