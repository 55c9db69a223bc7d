"""Reads what was appended to a file of JSON lines, from a place that a browser has kept for us.

A place is a number of bytes and a checksum of the last ones before it: a file that was written
anew (a restart cuts rows of steps that are done again) is noticed by whoever asks next, and a copy
of the file goes on where the original was.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from shoal.untrusted import open_plain

_CHECKED_BYTES = 1024
"""Before a place; more than a row, so that equal ends of rows are no matter."""
_MOST_BYTES = 256 << 20
"""Read at once; what is more comes with the next look."""


@dataclass(frozen=True)
class Place:
    """Where to go on in a file, and the last step that was read there."""

    offset: int = 0
    checksum: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"{self.offset}-{self.checksum:x}-{self.step}"

    @classmethod
    def from_text(cls, text: str) -> Place:
        """The inverse of str; the beginning, of anything else."""
        match = re.fullmatch(r"(\d{1,18})-([0-9a-f]{1,8})-(\d{1,18})", text)
        return cls(int(match[1]), int(match[2], 16), int(match[3])) if match else cls()


def read_on(path: Path, place: Place) -> tuple[list[bytes], Place, bool]:
    """Whole lines after `place`, the place after them (its step as it was), and whether they are
    from the file's beginning: then what was read of it before counts no more.

    A file that is not there, or is none, has no new lines: what was read stays.
    """
    try:
        file = open_plain(path)
    except OSError:
        return [], place, False
    anew = False
    with file:
        if _checksum(file.fileno(), place.offset) != place.checksum:
            place, anew = Place(), True
        if os.fstat(file.fileno()).st_size == place.offset:
            return [], place, anew
        file.seek(place.offset)
        *lines, rest = file.read(_MOST_BYTES).split(b"\n")  # the rest is still being written
        if not lines:
            return [], place, anew
        offset = file.tell() - len(rest)
        after = Place(offset, _checksum(file.fileno(), offset), place.step)
        return lines, after, place.offset == 0


def _checksum(descriptor: int, offset: int) -> int:
    start = max(0, offset - _CHECKED_BYTES)
    text = os.pread(descriptor, offset - start, start)
    return zlib.crc32(text) if len(text) == offset - start else -1
