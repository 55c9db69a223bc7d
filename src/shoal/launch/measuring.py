"""A job of one worker of the fork server that measures something; and waiting for the server."""

from __future__ import annotations

from typing import Any

from shoal.errors import WorkerError
from shoal.launch.attempt import Attempt
from shoal.launch.deaths import death_of
from shoal.launch.pool import WorkerPool
from shoal.observe.console import Console


def wait_for_imports(pool: WorkerPool, *, console: Console) -> None:
    """Until the fork server can start workers at once; says so where that is still to come."""
    if pool.ready_seconds is None:
        console.phase("importing torch and transformers, for all workers")
    while not is_ready(pool, wait_seconds=1.0):
        pass


def is_ready(pool: WorkerPool, *, wait_seconds: float = 0.0) -> bool:
    """Whether the fork server can start workers, after at most `wait_seconds`. No worker runs."""
    if pool.ready_seconds is None:
        for _ in pool.events(timeout_seconds=wait_seconds, only=[]):
            pass
    return pool.ready_seconds is not None


def measuring_job(
    target: str, payload: dict[str, Any], *, pool: WorkerPool, console: Console
) -> dict[str, Any]:
    """What the worker reports as `measured`. Raises the job's failure."""
    worker, attempt = pool.start(target, payload), Attempt(console)
    found: dict[str, Any] | None = None
    while not worker.told:
        for _, message in pool.events(timeout_seconds=1.0, only=[worker]):
            if message is not None:
                if message["kind"] == "measured":
                    found = message
                else:
                    attempt.hear(message)
    assert worker.status is not None, "it has ended"
    if worker.status < 0 and not attempt.errors:
        status, where = worker.status, "measuring"
        death = death_of(
            rank=0, status=status, step=0, where=where, error=None, stuck=None, ran_out=False
        )
        raise WorkerError(f"{death.text} while it measured this machine; start the run again")
    if found is None:
        raise attempt.failure()
    return found
