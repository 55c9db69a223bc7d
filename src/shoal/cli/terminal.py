"""What the commands write: the one place, so that no text of others moves a terminal."""

from __future__ import annotations

import sys

from shoal.observe.visible import visible


def say(text: str, *, styled: bool = False) -> None:
    """Print to standard output; a terminal gets control characters spelt out, a file as they are.

    A name, a completion or a recipe may hold escape sequences. `styled`: those in `text` are of
    the command itself, which has spelt out the others.
    """
    print(visible(text) if sys.stdout.isatty() and not styled else text, flush=True)


def show(piece: str) -> None:
    """A piece of a line that is still being written."""
    print(visible(piece) if sys.stdout.isatty() else piece, end="", flush=True)


def tell(text: str) -> None:
    """Print to standard error, control characters spelt out."""
    print(visible(text), file=sys.stderr, flush=True)
