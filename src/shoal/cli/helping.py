"""Help and usage errors in another language than English, as wide as a terminal is.

typer lays out help by a formatter that knows columns of Latin letters only; this one translates
what it is given and breaks lines where Chinese may be broken. English help does not come here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import typer.main

from shoal.cli.terminal import tell
from shoal.language import translated
from shoal.language.catalogue import width

_PIECE = re.compile(r"[　-鿿＀-￯]|[^\s　-鿿＀-￯]+|\s+")
"""Pieces of a text between which a line may end."""
_CLOSING = "，。；：、）？！"
"""Marks that begin no line."""
_FIRST_COLUMN = 30


def wrap(text: str, *, columns: int) -> list[str]:
    """The lines of a text, each of at most so many columns of a terminal."""
    lines, now = [], ""
    for piece in _PIECE.findall(text):
        if now and width(now + piece.rstrip()) > columns and piece not in _CLOSING:
            lines.append(now.rstrip())
            now = ""
        now += piece if now or piece.strip() else ""
    return [*lines, now.rstrip()] if now.strip() else lines


class Formatter:
    """What replaces those methods of a formatter that write texts."""

    width: int
    current_indent: int
    write: Callable[[str], None]

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """One line, however long."""
        self.write(f"{translated('Usage:')}{prog} {args}\n")

    def write_heading(self, heading: str) -> None:
        """A heading of a section."""
        self.write(f"{'':{self.current_indent}}{translated(f'{heading}:')}\n")

    def write_text(self, text: str) -> None:
        """Paragraphs; one that begins with \\b has its own lines."""
        for number, paragraph in enumerate(text.split("\n\n")):
            lines = paragraph.split("\n")
            if lines[0].strip() == "\b":
                made = [translated(line) for line in lines[1:]]
            else:
                whole = translated(" ".join(line.strip() for line in lines))
                made = wrap(whole, columns=self.width - self.current_indent)
            self.write("\n" if number else "")
            self.write("".join(f"{'':{self.current_indent}}{line}\n" for line in made))

    def write_dl(
        self, rows: Sequence[tuple[str, str]], col_max: int = _FIRST_COLUMN, col_spacing: int = 2
    ) -> None:
        """Two columns: a name, and what it is."""
        first = min(max(width(name) for name, _ in rows), col_max) + col_spacing
        left = " " * self.current_indent
        for name, text in rows:
            lines = wrap(translated(text), columns=max(self.width - first - 2, 10)) or [""]
            if width(name) + col_spacing <= first:
                self.write(f"{left}{name}{' ' * (first - width(name))}{lines[0]}\n")
            else:
                self.write(f"{left}{name}\n{left}{'':{first}}{lines[0]}\n")
            self.write("".join(f"{left}{'':{first}}{line}\n" for line in lines[1:]))


def command_of(app: typer.Typer) -> Any:
    """The command of `app`, with the help of it and of all below it translated."""
    command = typer.main.get_command(app)
    _translate(command)
    return command


def _translate(command: Any) -> None:
    context = command.context_class
    formatter = type("Translated", (Formatter, context.formatter_class), {})
    command.context_class = type("Context", (context,), {"formatter_class": formatter})
    for each in getattr(command, "commands", {}).values():
        _translate(each)


def show_usage_error(error: Any) -> None:
    """What click shows of a mistake in the arguments."""
    if error.ctx is not None and error.format_message() == error.ctx.get_help():
        tell(error.format_message(), verbatim=True)  # no words were given
        return
    if error.ctx is not None:
        hint = translated(
            f"Try '{error.ctx.command_path} {error.ctx.help_option_names[0]}' for help."
        )
        tell(f"{error.ctx.get_usage()}\n{hint}\n", verbatim=True)
    said = f"{translated('Error:')}{translated(error.format_message())}"
    tell(said, verbatim=True)
