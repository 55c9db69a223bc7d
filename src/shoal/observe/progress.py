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

Drawing = tuple[Sequence[Field], Sequence[Field], float | None]
"""Fields left and right of a bar, and how far it is, 0 to 1; None: a spinner stands before them."""

BAR = 3
"""Importance of the bar."""
_NARROWEST, _WIDEST = 8, 40  # of the bar, in columns
_GAP = "  "


class LiveLine:
    """One row at the bottom of a terminal, above which lines that stay are printed."""

    def __init__(self, out: TextIO) -> None:
        self._screen = Screen(file=out, highlight=False, markup=False, emoji=False)
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._draw: Callable[[], Drawing] = lambda: ((), (), None)

    def show(self, draw: Callable[[], Drawing]) -> None:
        """Show what `draw` says from now on: a thread of rich's asks it four times a second."""
        self._draw = draw
        if self._live is None:
            self._live = Live(self, console=self._screen, transient=True, refresh_per_second=4)
            self._live.start(refresh=True)

    def print(self, text: str) -> None:
        """Lines that stay, broken between words; what follows a break is indented."""
        columns = max(20, self._screen.width)
        for line in text.split("\n"):
            self._screen.print(Text(wrapped(line, columns=columns)), soft_wrap=True)

    def end(self) -> None:
        """Take the live line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich_console__(self, screen: Screen, options: ConsoleOptions) -> RenderResult:
        left, right, done = self._draw()
        room = options.max_width - 1  # the last column makes some terminals begin a new row
        if done is None:
            spinner = self._spinner.render(screen.get_time())
            yield Text(f"{spinner} ", end="")
            room -= 2
        begin, bar, end = fitting(left, right, room=room, bar=done is not None)
        yield Text(begin, no_wrap=True, overflow="crop", end="")
        if bar:
            drawn = ProgressBar(total=1.0, completed=min(done or 0.0, 1.0), width=bar)
            yield Segment(_GAP)
            yield from (part for part in screen.render(drawn) if part.text != "\n")
            yield Segment(_GAP)
        yield Text(end, no_wrap=True, overflow="crop")


def fitting(
    left: Sequence[Field], right: Sequence[Field], *, room: int, bar: bool
) -> tuple[str, int, str]:
    """What of the fields fits `room` columns, and how wide the bar is (0: there is none).

    The least important go first, the bar among them; it takes what room is left.
    """
    kept = sorted({rank for rank, _ in (*left, *right)} | ({BAR} if bar else set()))
    while True:
        begin = _GAP.join(text for rank, text in left if rank in kept)
        end = _GAP.join(text for rank, text in right if rank in kept)
        taken = cell_len(begin) + (len(_GAP) + cell_len(end) if end else 0)
        wanted = len(_GAP) + _NARROWEST if bar and BAR in kept else 0
        if taken + wanted <= room or len(kept) <= 1:
            break
        kept.pop()
    if not wanted:
        return (begin + _GAP + end if end else begin)[: max(room, 1)], 0, ""
    return begin, max(1, min(_WIDEST, room - taken - len(_GAP))), end


def wrapped(line: str, *, columns: int) -> str:
    """`line` broken between words, what follows a break indented; a long word stays whole."""
    if cell_len(line) <= columns:
        return line
    rows = textwrap.wrap(
        line,
        columns,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    return "\n".join(rows)
