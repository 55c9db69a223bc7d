"""A rank as its supervisor sees it: the worker that has it now, and how far that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import Stopped
from shoal.launch.pool import Worker
from shoal.launch.site import Site

STOPPED = Stopped.exit_status
WAITING = "waiting for a generation"


@dataclass
class SupervisedWorker:
    """A rank of the run, and the worker process that has it now."""

    rank: int
    site: Site
    worker: Worker
    waiting: bool = False
    """Built, and waiting for a generation."""
    generation: int = 0
    """The generation it was last told to join."""
    error: dict[str, Any] | None = None
    stuck: str | None = None
    done: bool = False
    """It has come to its end and said so."""
    absent: bool = False
    """Its host has gone, and the others go on without it until it is back."""

    @property
    def alive(self) -> bool:
        return self.worker.status is None


def left_behind(workers: Sequence[SupervisedWorker]) -> list[SupervisedWorker]:
    """Those that wait for a generation which nobody else will join: the others have ended well.

    They stopped, or came to the end, after the step in which a newcomer was announced.
    """
    left = [one for one in workers if one.alive and not one.done]
    others = [one for one in workers if not one.absent and one not in left]
    if not others or not all(one.done or one.worker.status == STOPPED for one in others):
        return []
    beats = [one.site.last_beat(one.rank) for one in left]
    waits = all(beat is not None and beat.phase == WAITING for beat in beats)
    return left if waits else []
