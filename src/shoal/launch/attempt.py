"""What the workers of a run have said, and the error that best explains its end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

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
from shoal.launch.callbacks import Callbacks
from shoal.launch.cluster import Event
from shoal.launch.deaths import Death
from shoal.launch.directory import is_run, last_saved
from shoal.observe.console import Console
from shoal.observe.record import RunRecord

_USER_ERRORS = {kind.__name__: kind for kind in (DataError, ModelError, RunError, FetchError)}


@dataclass
class Attempt:
    """What the workers have said so far."""

    console: Console
    begun: Callable[[], None] = lambda: None
    """Called once the workers have restored or started."""
    done: dict[str, Any] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    story: list[dict[str, Any]] = field(default_factory=list)
    """Every event, with the monotonic time at which it was heard of."""
    callbacks: Callbacks = field(default_factory=lambda: Callbacks(None))
    record: RunRecord | None = None
    """Writes what they say of the run, where hosts share no run folder."""
    _waiting: list[Event] = field(default_factory=list)

    def hear(self, message: dict[str, Any]) -> None:
        """Show or keep one message."""
        if self.record is not None:
            if message["kind"] == "row" and self.record.knows(message["row"]):
                return
            for told in self.record.hear(message):
                self._hear(told)
        self._hear(message)

    def happened(self, events: Iterable[Event], *, run: Path) -> None:
        """Tell and write down what the cluster has seen, once the run has begun."""
        self._waiting.extend(events)
        if not self._waiting or not is_run(run):
            return
        files = RunRecord(run) if self.record is None else None
        for name, fields in self._waiting:
            if files is not None:
                files.event(name, fields)
            self.hear({"kind": "event", "name": name, "fields": fields})
        self._waiting.clear()
        if files is not None:
            files.close()

    def close(self) -> None:
        """Nothing more will be heard."""
        if self.record is not None:
            self.record.close()

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "row":
            self.console.row(message["row"])
        elif kind == "event":
            if message["name"] in ("started", "resumed"):
                self.begun()
            self.console.event(message["name"], message["fields"])
            now = time.monotonic()
            self.story.append({"event": message["name"], "monotonic": now, **message["fields"]})
        elif kind == "phase":
            self.console.phase(message["text"])
        elif kind == "progress":
            self.console.progress(message["text"], message["done"])
        elif kind == "error":
            self.errors.append(message)
        elif kind == "stopped":
            self.stopped = message["text"]
        elif kind == "done":
            self.done = message
        self.callbacks.hear(message)

    def user_error(self) -> ShoalError | None:
        """The mistake of the user that a worker reported, if any."""
        for error in self.errors:
            if error["user"]:
                return _USER_ERRORS.get(error.get("type", ""), UserError)(error["text"])
        return None

    def failure(self) -> ShoalError:
        """The error that best explains the end: a cause before those it brought about."""
        mistake = self.user_error()
        if mistake is not None:
            return mistake
        causes = [e for e in self.errors if e.get("cause")] or self.errors
        if causes:
            first = causes[0]
            return WorkerError(f"worker {first['rank']}: {first['text']}\n{first['trace']}")
        return WorkerError("a worker ended without a word; its output above may say why")


def gave_up(
    death: Death, *, times: int, run: Path, doctor: str = "", again: bool = False
) -> WorkerError:
    """What is said when the same step fails again and again; `again`: by the same error."""
    often = f" at step {death.step}, {times} times" if times > 1 else f" ({death.where})"
    if again:
        often = f" at step {death.step}, twice at the same place: trying again would not mend it"
    advice = f"resume the run to go on from its last checkpoint: shoal resume {run}"
    if last_saved(run) is None:
        advice = "nothing was saved yet"
    if doctor:
        return WorkerError(f"{death.text}{often}\n{doctor}\n{advice}")
    trace = f"\n{death.trace.rstrip()}" if death.trace else ""
    return WorkerError(f"{death.text}{often}; {advice}{trace}")


def stopped_at_once(run: Path) -> ShoalError:
    """What is said when a person asks twice."""
    saved = last_saved(run)
    if saved is not None:
        return Stopped(
            f"stopped at once; what followed the save {saved} is lost; go on with: "
            f"shoal resume {run}"
        )
    return Interrupted(f"stopped at once, before the first save; {run} holds nothing to resume")


@contextmanager
def signals_asked() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 instead of dying of them (in the main thread only)."""
    asked: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        asked.append(number)

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: the caller owns the signals
        pass
    try:
        yield asked
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
