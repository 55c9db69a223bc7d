"""Cached folders that appear whole or not at all, whoever is killed or makes them twice."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.errors import UserError

_ABANDONED_SECONDS = 6 * 3600.0


@contextmanager
def appearing(
    folder: Path, *, is_whole: Callable[[Path], bool], error: type[UserError]
) -> Iterator[Path]:
    """A scratch folder beside `folder` that takes its name when the block ends well.

    When another process was faster and its folder `is_whole`, that one stands; a damaged one is
    replaced. A failed write (no space left, read-only) is raised as `error`.
    """
    prefix = f".making-{folder.name}-"
    scratch = folder.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent, prefix=prefix)
        scratch.mkdir()
        yield scratch
        if folder.exists() and not is_whole(folder):
            shutil.rmtree(folder)
        try:
            os.rename(scratch, folder)
        except OSError:
            if not is_whole(folder):
                raise
    except OSError as cause:
        raise error(
            f"{folder.parent}: cannot write there: {cause}; free some space, or set SHOAL_CACHE "
            f"to a folder that has some"
        ) from cause
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(parent: Path, *, prefix: str) -> None:
    """Delete scratch folders that killed processes left; young ones may be in use."""
    for path in parent.glob(f"{prefix}*"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
