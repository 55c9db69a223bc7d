"""A terminal for tests: a real one (pty), and what would stand on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

_TOKEN = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


class Screen:
    """Rows of text, written as a terminal of `columns` would: wrapped, erased, overwritten."""

    def __init__(self, *, columns: int) -> None:
        self.columns, self.row, self.column = columns, 0, 0
        self.rows: list[list[str]] = [[]]

    def feed(self, text: str) -> None:
        """Obey what a program wrote. Raises ValueError for what this terminal does not know."""
        at = 0
        for found in _TOKEN.finditer(text):
            if found.start() != at:
                raise ValueError(repr(text[at : found.start()]))
            at = found.end()
            number, command, home, feed, plain = found.groups()
            if command == "K":
                self.rows[self.row] = self.rows[self.row][: 0 if number == "2" else self.column]
            elif command == "A":
                self.row = max(0, self.row - int(number or 1))
            elif command not in ("m", "h", "l", None):
                raise ValueError(found[0])
            if home:
                self.column = 0
            if feed:
                self._next()
            for letter in plain or "":
                if self.column == self.columns:
                    self.column = 0
                    self._next()
                row = self.rows[self.row]
                row += [" "] * (self.column + 1 - len(row))
                row[self.column] = letter
                self.column += 1

    def _next(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    @property
    def lines(self) -> list[str]:
        """What stands there, without the blank rows at the end."""
        return "\n".join("".join(row).rstrip() for row in self.rows).rstrip("\n").split("\n")


def on_a_terminal(code: str, *, columns: int, term: str = "xterm") -> tuple[str, Screen]:
    """What a Python program writes to a terminal of `columns`, and the screen at its end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {**os.environ, "TERM": term}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    written = b""
    try:
        while data := os.read(ours, 1 << 16):
            written += data
    except OSError:  # Linux says EIO when the other end is closed
        pass
    os.close(ours)
    assert program.wait() == 0, written.decode()
    text = written.decode()
    screen = Screen(columns=columns)
    screen.feed(text)
    return text, screen
