"""Which program this is, by content: what ranks and hosts of a run must have alike. No torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import xxhash

import shoal


@cache
def code_hash() -> str:
    """Hash of shoal's own sources."""
    assert shoal.__file__ is not None, "shoal is a package with a file"
    root, total = Path(shoal.__file__).parent, xxhash.xxh3_64()
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()
