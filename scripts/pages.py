"""Writes pages of docs/ that are made from the sources, or says which are not current."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_or_check(pages: Mapping[Path, str], *, script: str) -> int:
    """Write what differs; with --check write nothing. The exit status: 1 if one is not current."""
    checks = "--check" in sys.argv[1:]
    stale = []
    for path, text in pages.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not checks:
                path.write_text(text, encoding="utf-8")
    if stale and checks:
        print(f"not current: {', '.join(stale)}; run python scripts/{script}.py")
        return 1
    return 0
