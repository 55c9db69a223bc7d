"""Large pages for what a process holds: a step reads every weight, and each page it must look up.

With pages of 4 KiB a step of SmolLM2 takes a tenth longer, and by how much depends on where its
weights came to lie (docs/evidence/serving.md).
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

_PAGE = 2 << 20
_COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1 and later, which Python has no name for."""
_LARGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0\s*(?:\[heap\])?$")
"""Memory of this process alone that is no part of a file."""


def hold_in_large_pages(*, least: int = 64 << 20) -> int:
    """Ask Linux for large pages under all memory in regions of `least` bytes; bytes it agreed to.

    What it refuses stays as it is. A second or so for each GiB, once.
    """
    if not sys.platform.startswith("linux"):
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    agreed = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = _LARGE.match(line)
        if found is None:
            continue
        first, end = (int(each, 16) for each in found.groups())
        first, end = -(-first // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if end - first < least or advise(first, end - first, mmap.MADV_HUGEPAGE):
            continue
        agreed += 0 if advise(first, end - first, _COLLAPSE) else end - first
    return agreed
