"""Run directories: claim a new one, open an old one."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from shoal.errors import RunError, nearest

_MARKS = ("config.yaml", "metrics.jsonl", "checkpoints")


def claim(out: str | Path | None, *, name: str) -> Path:
    """A directory for a new run; by default the next free runs/NAME-NUMBER.

    Raises RunError when `out` holds a run (nothing is ever written over), is not empty, or cannot
    be written.
    """
    if out is None:
        return _next(Path("runs"), name=name)
    run = Path(out).expanduser()
    if any((run / mark).exists() for mark in _MARKS):
        raise RunError(
            f"{run}: already holds a run, which is not written over; go on with it by "
            f"'shoal resume {run}', or choose another --out"
        )
    if run.is_file() or (run.is_dir() and any(run.iterdir())):
        raise RunError(f"{run}: expected a new or empty folder for the run, found other files")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_made(run, error) from None
    if not os.access(run, os.W_OK):
        raise RunError(f"{run}: cannot be written to; choose another --out")
    return run


def _next(base: Path, *, name: str) -> Path:
    """The next free BASE/NAME-NUMBER, made here: two runs started at once get two folders."""
    for number in itertools.count(1):
        run = base / f"{name}-{number:03d}"
        try:
            base.mkdir(parents=True, exist_ok=True)
            run.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise _not_made(run, error) from None
        return run
    raise AssertionError("numbers do not end")


def _not_made(run: Path, error: OSError) -> RunError:
    return RunError(f"{run}: cannot be made: {error.strerror}; choose another --out")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all. Raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def open_run(run: str | Path) -> Path:
    """The directory of an existing run. Raises RunError."""
    folder = Path(run).expanduser()
    if (folder / "config.yaml").is_file():
        return folder
    if not folder.is_dir():
        beside = folder.parent
        names = [p.name for p in beside.iterdir() if p.is_dir()] if beside.is_dir() else []
        raise RunError(f"{folder}: no such run; {nearest(folder.name, names)}".rstrip("; "))
    raise RunError(f"{folder}: expected a run directory (with config.yaml), found none")
