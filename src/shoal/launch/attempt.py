"""The workers of one start: start them, show what they say, pass signals on, end them cleanly."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from shoal.engine.decision import Decision
from shoal.errors import (
    DataError,
    FetchError,
    Interrupted,
    ModelError,
    RunError,
    ShoalError,
    Stopped,
    UserError,
    WorkerError,
)
from shoal.launch.pool import Worker, WorkerPool
from shoal.observe.console import Console

TARGET = "shoal.engine.worker:run"
_USER_ERRORS = {kind.__name__: kind for kind in (DataError, ModelError, RunError, FetchError)}
_GRACE_SECONDS = 1.0
"""After one worker failed, the others may still say what they saw before they are ended."""


@dataclass
class Attempt:
    """The workers of one start, in rank order, and what they have said."""

    workers: list[Worker]
    console: Console
    begun: Callable[[], None] = lambda: None
    """Called once the workers have restored or started."""
    done: dict[str, Any] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    killed: list[int] = field(default_factory=list)
    """Ranks that a signal ended, first one first; never those that this process ended."""

    def hear(self, message: dict[str, Any]) -> None:
        """Show or keep one message."""
        kind = message["kind"]
        if kind == "row":
            self.console.row(message["row"])
        elif kind == "event":
            if message["name"] in ("started", "resumed"):
                self.begun()
            self.console.event(message["name"], message["fields"])
        elif kind == "phase":
            self.console.phase(message["text"])
        elif kind == "error":
            self.errors.append(message)
        elif kind == "stopped":
            self.stopped = message["text"]
        elif kind == "done":
            self.done = message

    def failure(self) -> ShoalError | None:
        """The error that best explains the end: a cause before those it brought about."""
        for error in self.errors:
            if error["user"]:
                return _USER_ERRORS.get(error.get("type", ""), UserError)(error["text"])
        if self.killed:
            rank = self.killed[0]
            name = signal.Signals(-(self.workers[rank].status or 0)).name
            return WorkerError(
                f"worker {rank} was killed ({name}), by the system or by a person (out of memory "
                "is the usual reason); resume the run to go on from its last checkpoint"
            )
        causes = [e for e in self.errors if e.get("cause")] or self.errors
        if causes:
            first = causes[0]
            return WorkerError(f"worker {first['rank']}: {first['text']}\n{first['trace']}")
        if any(w.status not in (0, 75) for w in self.workers):
            return WorkerError("a worker ended without a word; its output above may say why")
        return None


def run_workers(
    payload: dict[str, Any],
    *,
    decision: Decision,
    pool: WorkerPool,
    console: Console,
    begun: Callable[[], None] = lambda: None,
) -> Attempt:
    """Start the workers of `decision` and wait for their end. Raises the error that ended them.

    SIGINT and SIGTERM ask the workers to save and stop; a second one ends them at once (Stopped
    when there is a checkpoint to resume from, else Interrupted).
    """
    size = 1 if decision.workers == "threads" else decision.layout.workers
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder, _signals() as asked:
        store = str(Path(folder) / "store")
        workers = [
            pool.start(TARGET, {**payload, "rank": rank, "size": size, "store": store})
            for rank in range(size)
        ]
        attempt = Attempt(workers, console, begun)
        console.steps = payload["recipe"]["train"].get("steps")
        try:
            _watch(attempt, pool=pool, asked=asked, run=Path(payload["run"]))
        finally:
            pool.kill([w for w in workers if w.status is None])
    failure = attempt.failure()
    if failure is not None and attempt.done is None and attempt.stopped is None:
        raise failure
    return attempt


def _watch(attempt: Attempt, *, pool: WorkerPool, asked: list[int], run: Path) -> None:
    """Hear the workers until all have ended; when one fails, the rest are ended after a moment."""
    passed_on = 0
    deadline = None
    while any(worker.status is None for worker in attempt.workers):
        for worker, message in pool.events(timeout_seconds=0.2):
            if worker not in attempt.workers:
                continue
            if message is not None:
                attempt.hear(message)
            elif worker.status not in (0, 75):
                if worker.status is not None and worker.status < 0:
                    attempt.killed.append(attempt.workers.index(worker))
                deadline = deadline or time.monotonic() + _GRACE_SECONDS
        if len(asked) > passed_on:
            passed_on = len(asked)
            if passed_on > 1:
                raise _at_once(run)
            attempt.console.phase("asked to stop: saving after this step (again: stop at once)")
            for worker in attempt.workers:
                pool.signal(worker, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            return


def _at_once(run: Path) -> ShoalError:
    saved = sorted(run.glob("checkpoints/step-*"))
    if saved:
        return Stopped(
            f"stopped at once; what followed the save {saved[-1].name} is lost; go on with: "
            f"shoal resume {run}"
        )
    return Interrupted(f"stopped at once, before the first save; {run} holds nothing to resume")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them (in the main thread only)."""
    asked: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: the caller owns the signals
        pass
    try:
        yield asked
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
