"""The live line of a terminal: what goes on, how far it is, and when it will be done. rich draws.

Imported only where the output is a terminal. The line is one row high and as wide as the terminal
is at the time; what does not fit is left out, the least important field first.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console as Screen
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

Field = tuple[int, str]
"""How important it is (0: the most), and what it says."""
Drawing = tuple[Sequence[Field], float | None]
"""Fields, and how far it is, 0 to 1, for a bar after the first; None: a spinner before them."""

BAR: Field = (3, " " * 8)
"""Stands for the bar among the fields, at its narrowest."""
_WIDEST = 40
_GAP = "  "


class LiveLine:
    """One row at the bottom of a terminal, above which lines that stay are printed."""

    def __init__(self, out: TextIO) -> None:
        self._screen = Screen(file=out, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._draw: Callable[[], Drawing] = lambda: ((), None)
        self.able = not self._screen.is_dumb_terminal
        """Whether the terminal can draw a line again."""

    def show(self, draw: Callable[[], Drawing]) -> None:
        """Show what `draw` says from now on: a thread of rich's asks it four times a second."""
        self._draw = draw
        if self._live is None:
            self._live = Live(self, console=self._screen, transient=True, refresh_per_second=4)
            self._live.start(refresh=True)

    def print(self, text: str) -> None:
        """Lines that stay, broken between words."""
        columns = max(20, self._screen.width)
        for line in text.split("\n"):
            self._screen.print(Text(wrapped(line, columns=columns)), soft_wrap=True)

    def end(self) -> None:
        """Take the live line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich_console__(self, screen: Screen, options: ConsoleOptions) -> RenderResult:
        fields, done = self._draw()
        fields = [field for field in fields if field[1]]
        if done is None:
            fields = [(0, f"{self._spinner.render(screen.get_time())}"), *fields]
        else:
            fields = [*fields[:1], BAR, *fields[1:]]
        # room for the ^C that a terminal echoes, or it would begin a row that nobody erases
        kept, left = fitting(fields, room=options.max_width - 3)
        for number, field in enumerate(kept):
            yield Segment(_GAP if number else "")
            if field is BAR:
                width = min(_WIDEST, len(BAR[1]) + left)
                bar = ProgressBar(total=1.0, completed=min(done or 0.0, 1.0), width=width)
                yield from (part for part in screen.render(bar) if part.text != "\n")
            else:
                yield Segment(field[1])


def fitting(fields: Sequence[Field], *, room: int) -> tuple[list[Field], int]:
    """The fields that fit `room` columns together, and the columns that are left.

    The least important go first, of equals the first; one always stays.
    """
    kept = list(fields)
    while (left := room - cell_len(_GAP.join(text for _, text in kept))) < 0 and len(kept) > 1:
        kept.remove(max(kept, key=lambda field: field[0]))
    return kept, left


def wrapped(line: str, *, columns: int) -> str:
    """`line` broken between words, what follows a break indented; a long word stays whole."""
    breaks = textwrap.TextWrapper(columns, break_long_words=False, break_on_hyphens=False)
    breaks.subsequent_indent = "    "
    return breaks.fill(line)
