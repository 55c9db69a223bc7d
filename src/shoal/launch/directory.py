"""Run directories: claim a new one, open an old one."""

from __future__ import annotations

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
        base, number = Path("runs"), 1
        while (base / f"{name}-{number:03d}").exists():
            number += 1
        out = base / f"{name}-{number:03d}"
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
        raise RunError(f"{run}: cannot be made: {error.strerror}; choose another --out") from None
    if not os.access(run, os.W_OK):
        raise RunError(f"{run}: cannot be written to; choose another --out")
    return run


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
