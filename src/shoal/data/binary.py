"""Reads numbers, text and arrays of a binary file one after the other, least byte first."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Reader:
    """Raises struct.error or ValueError where `content` ends too early."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def number(self, form: str) -> Any:
        """One number, its form as struct names it."""
        (value,) = struct.unpack_from(f"<{form}", self.content, self.at)
        self.at += struct.calcsize(form)
        return value

    def array(self, kind: DTypeLike, size: int) -> NDArray[Any]:
        """`size` elements, as a view."""
        found = np.frombuffer(self.content, kind, size, self.at)
        self.at += found.nbytes
        return found

    def raw(self, size: int) -> bytes:
        """Bytes: fewer where the file ends."""
        self.at += size
        return self.content[self.at - size : self.at]
