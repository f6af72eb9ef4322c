"""How long work tells how far it is: what is done, of how much, and what is happening."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]


def quiet(done: int, total: int, message: str) -> None:
    """Tell nobody."""
