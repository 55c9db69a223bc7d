"""A rank as its supervisor sees it: the worker that has it now, and how far that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.launch.pool import Worker
from shoal.launch.site import Site


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
