"""Cached folders that appear whole or not at all, whoever is killed or makes them twice."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from shoal.errors import UserError
from shoal.untrusted import is_plain_name

_ABANDONED_SECONDS = 6 * 3600.0
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading damaged JSON, and looking into it, raises."""


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


def contents_of(folder: Path) -> dict[str, dict[str, Any]]:
    """`files`: size of every file below `folder` by its path there; `hashes`: xxh3 of its bytes."""
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {
        "files": {name: path.stat().st_size for name, path in paths.items()},
        "hashes": {name: hash_of(path) for name, path in paths.items()},
    }


def damage(folder: Path, about: dict[str, Any], *, hashed: bool) -> str | None:
    """What is wrong with the first file of `folder` that is not as `about` (`contents_of`) has it.

    Not `hashed`: its size only, which costs nothing. Notes of older versions have no hashes.
    """
    hashes = about.get("hashes", {}) if hashed else {}
    for name, size in about["files"].items():
        path = folder / name
        plain = all(is_plain_name(part) for part in name.split("/"))
        there = plain and path.is_file() and not path.is_symlink()
        got = path.stat().st_size if there else None
        if got != size:
            return f"{path}: expected {size} bytes, got {'no file' if got is None else got}"
        if name in hashes and hash_of(path) != hashes[name]:
            return f"{path}: its bytes are not those that were written"
    return None


def note_contents(folder: Path, *, notes: str, **more: Any) -> None:
    """Write `contents_of` the folder, and what `more` is to be known of it, to its file `notes`."""
    text = json.dumps({**more, **contents_of(folder)}, indent=1)
    (folder / notes).write_text(text, encoding="utf-8")


def noted_damage(folder: Path, *, notes: str, hashed: bool = True) -> str | None:
    """`damage` of a folder by its file `notes`; damaged notes are damage."""
    try:
        about = json.loads((folder / notes).read_text(encoding="utf-8"))
        return damage(folder, about, hashed=hashed)
    except UNREADABLE as error:
        return f"{folder / notes}: cannot be read ({error!r})"


def hash_of(path: Path) -> str:
    """xxh3 of a file's bytes: finds damage, not forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sweep(parent: Path, *, prefix: str) -> None:
    """Delete scratch folders that killed processes left; young ones may be in use."""
    for path in parent.glob(f"{prefix}*"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
