"""Worker jobs of tests, on the fork server."""

from __future__ import annotations

from typing import Any

from shoal.launch.pool import WorkerPool


def run_workers(
    pool: WorkerPool, target: str, payload: dict[str, Any], *, size: int
) -> list[dict[str, Any]]:
    """Start `size` workers and wait for all; what each said as `found`, if anything."""
    workers = [pool.start(target, {**payload, "rank": rank}) for rank in range(size)]
    found: list[dict[str, Any]] = []
    while any(worker.status is None for worker in workers):
        for _, message in pool.events(timeout_seconds=1, only=workers):
            if message is not None and "found" in message:
                found.append(message["found"])
        if any(worker.status not in (None, 0) for worker in workers):
            pool.kill([worker for worker in workers if worker.status is None])
    assert [worker.status for worker in workers] == [0] * size, "a worker failed; see its output"
    return found
