"""What the commands write: the one place, so that no text of others moves a terminal.

Here texts are said in the language chosen (`--lang`); `verbatim` ones are data and stay: JSON,
YAML, scripts, what a model wrote.
"""

from __future__ import annotations

import sys

from shoal.language import translated
from shoal.observe.visible import visible


def say(text: str, *, styled: bool = False, verbatim: bool = False) -> None:
    """Print to standard output; a terminal gets control characters spelt out, a file as they are.

    A name, a completion or a recipe may hold escape sequences. `styled`: those in `text` are of
    the command itself, which has spelt out the others.
    """
    text = text if styled or verbatim else translated(text)
    print(visible(text) if sys.stdout.isatty() and not styled else text, flush=True)


def show(piece: str) -> None:
    """A piece of a line that is still being written."""
    print(visible(piece) if sys.stdout.isatty() else piece, end="", flush=True)


def tell(text: str, *, verbatim: bool = False) -> None:
    """Print to standard error, control characters spelt out."""
    print(visible(text if verbatim else translated(text)), file=sys.stderr, flush=True)
