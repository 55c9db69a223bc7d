"""A worker of a run: the engine, and what it borrows of rooms beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shoal.engine import worker
from shoal.models.stored import Weights
from shoal.tasks.playing import Writes


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a worker of the fork server; returns its exit status."""
    return worker.run(payload, descriptor, make_writes=make_writes)


def make_writes(config: Any, *, auto_class: str, weights: Callable[[], Weights]) -> Writes:
    """Completions by the engine of serving; ModelError where it cannot be exact."""
    from shoal.serve.rollouts import Rollouts

    return Rollouts(config, auto_class=auto_class, weights=weights)
