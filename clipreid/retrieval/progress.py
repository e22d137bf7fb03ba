"""How long work reports how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""progress(done, total): called as work goes on, with how many images this rank is through with, and of how many."""


def unreported(done: int, total: int) -> None:
    """A Progress that nobody sees."""
