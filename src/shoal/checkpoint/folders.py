"""The folders of saves, by their names: published ones, and those that wait to count. No torch.

Where a registry says which saves count (launch/registry), workers leave a save as
`uncommitted-step-00000100.g7`, which nothing loads: the number is that of the generation that
wrote it. Once it is committed its coordinator gives it the name of a checkpoint. So a save of hosts
that were cut off meanwhile is never taken for one, however new its folder is.
What one host of several has saved of a step, where none has all of it, is in
`step-00000100.g7.host-1`, on its own disk and on another's; nothing loads that either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from shoal.checkpoint.files import Files

_PUBLISHED = re.compile(r"step-(\d{8,})")
_WAITING = re.compile(r"uncommitted-step-(\d{8,})\.g(\d+)")
_DIVIDED = re.compile(r"step-(\d{8,})\.g\d+\.host-\d+")


def published_name(step: int) -> str:
    """Of the checkpoint of `step`."""
    return f"step-{step:08d}"


def waiting_name(step: int, *, generation: int) -> str:
    """Of a save of `step` that does not count yet."""
    return f"uncommitted-step-{step:08d}.g{generation}"


def divided_name(step: int, *, generation: int, host: int) -> str:
    """Of what host number `host` of a generation has saved of a step."""
    return f"{published_name(step)}.g{generation}.host-{host}"


def divided_saves(folder: Path) -> list[tuple[int, str]]:
    """(step, name) of what hosts have saved of a step, each its own."""
    if not folder.is_dir():
        return []
    matches = [_DIVIDED.fullmatch(path.name) for path in folder.iterdir()]
    return sorted((int(match[1]), match[0]) for match in matches if match)


def is_published(name: str) -> bool:
    """Whether a folder's name is that of a checkpoint."""
    return _PUBLISHED.fullmatch(name) is not None


def published_steps(folder: Path) -> list[int]:
    """Steps that have a published checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    matches = [_PUBLISHED.fullmatch(path.name) for path in folder.iterdir()]
    return sorted(int(match[1]) for match in matches if match)


def waiting_saves(folder: Path) -> list[tuple[int, int]]:
    """(generation, step) of the saves that wait to be committed, in this order."""
    if not folder.is_dir():
        return []
    matches = [_WAITING.fullmatch(path.name) for path in folder.iterdir()]
    return sorted((int(match[2]), int(match[1])) for match in matches if match)


def publish(
    folder: Path, source: Path, *, step: int, keep: int, kept: Sequence[int], files: Files
) -> Path:
    """Give the whole save at `source` the name of a checkpoint, then drop the oldest beyond `keep`.

    A later step that is already there could not be loaded, else the run would have gone on
    from it: it goes too, and never counts among those kept. `kept`: steps that stay whatever else
    goes. Raises OSError.
    """
    final, replaced = folder / published_name(step), folder / f".step-{step:08d}.replaced"
    later = [other for other in published_steps(folder) if other > step]
    if final.exists() and source.exists():
        files.rename(final, replaced)
    try:
        files.rename(source, final)
    except FileNotFoundError:  # somebody else has done it meanwhile
        if replaced.exists() and not final.exists():
            files.rename(replaced, final)
        raise
    for replaced in folder.glob(".step-*.replaced"):
        files.remove(replaced)
    earlier = [other for other in published_steps(folder) if other <= step]
    for old in [*(other for other in earlier[:-keep] if other not in kept), *later]:
        drop(folder, published_name(old), files=files)
    return final


def drop(folder: Path, name: str, *, files: Files) -> None:
    """Remove a save: half a removal must not look like one. Raises OSError."""
    dropped = folder / f".{name}.dropped"
    files.rename(folder / name, dropped)
    files.remove(dropped)
