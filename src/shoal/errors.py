"""The exception tree. Every message says what is wrong, where, what was expected, what to do.

ShoalError
+-- UserError            the user's mistake: exit status 2, one clear message, no traceback
|   +-- ConfigError      a recipe or override that cannot be run; collects every problem found
|   +-- DataError        a source that cannot be read or does not fit the model or task
|   +-- ModelError       a model that cannot be read, built or placed
|   +-- RunError         a run directory or checkpoint that cannot be used as asked
|   +-- FetchError       something that had to be fetched could not be
+-- CheckpointError      a checkpoint is damaged (the caller may fall back to an older one)
+-- WorkerError          a worker failed; carries rank and phase
|   +-- PeersLost        a collective failed because another rank is gone: nothing is lost yet
+-- ChannelError         state could not be handed over between workers (another donor may do)
+-- Stopped              asked to stop by a signal, saved: exit status 75
+-- Diverged             ended for a loss that stayed above its start
+-- Interrupted          ended by a signal with nothing saved
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class ShoalError(Exception):
    """Root of every error that shoal raises on purpose."""

    exit_status = 1


class UserError(ShoalError):
    """What, where, expected, got, and what to do next; printed without a traceback."""

    exit_status = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: where it is, what is wrong, and what to do."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"\n    {self.hint}" if self.hint else "")


class ConfigError(UserError):
    """Every problem of a recipe in one report."""

    def __init__(self, problems: Sequence[Problem], *, source: str = "") -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''}" + (f" in {source}" if source else "")
        super().__init__("\n".join([head + ":", *(f"  {problem}" for problem in self.problems)]))


class DataError(UserError):
    """A source that cannot be read, or that does not fit the model or the task."""


class ModelError(UserError):
    """A model that cannot be read, built or placed."""


class RunError(UserError):
    """A run directory or a checkpoint that cannot be used as asked."""


class FetchError(UserError):
    """Something that had to be fetched could not be."""


class CheckpointError(ShoalError):
    """A checkpoint is damaged; names the file. The caller may fall back to an older one."""


class WorkerError(ShoalError):
    """A worker failed. The message carries its rank, its phase and its traceback."""


class PeersLost(WorkerError):
    """A collective could not be completed: another rank is gone, or in a new generation."""


class ChannelError(ShoalError):
    """State could not be handed from one worker to another; nothing was changed by the attempt."""


class Stopped(ShoalError):
    """Stopped on request after saving; the run can be resumed."""

    exit_status = 75


class Diverged(ShoalError):
    """Ended because the loss had stayed above its start, as the recipe says; nothing is lost."""


class Interrupted(ShoalError):
    """Ended by a signal before anything was saved; there is nothing to resume."""


_FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this system allows (ulimit -f)",
    errno.EROFS: "the file system can only be read",
}


def disk_problem(error: OSError) -> str | None:
    """What to tell a person whose disk cannot take a file; None for any other error."""
    reason = _FULL.get(error.errno or 0)
    if reason is None:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{reason}; make room, or choose a folder on another disk"


def nearest(word: str, known: Iterable[str], *, count: int = 3) -> str:
    """A hint such as "did you mean 'tensor'?" for an unknown `word`, or a list of what is known."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "known: " + ", ".join(names) if names else ""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, torch's on a CPU, or a device's."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return "can't allocate memory" in text or "out of memory" in text
