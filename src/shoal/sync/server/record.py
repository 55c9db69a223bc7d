"""The order in which pushes, pulls and all else happened at a server, and a run in that order.

RUN/server/order-N.jsonl has one line for each event. A gradient follows from the parameters that
were pulled and the samples, so the order is all that an asynchronous run adds to its recipe.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

from shoal.errors import RunError

_KEPT = ("event", "position", "replica")


def order_file(folder: Path, server: int) -> Path:
    """Where server number `server` of a run records."""
    return folder / f"order-{server}.jsonl"


class Record:
    """The recording end; appends, also after a restart."""

    def __init__(self, folder: Path, server: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = order_file(folder, server).open("a", encoding="utf-8")

    def note(self, event: dict[str, Any]) -> None:
        """One event; on the disk after `flush`, as far as the system sees to it."""
        line = {name: event[name] for name in _KEPT if name in event}
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Hand over what was noted."""
        self._file.flush()

    def close(self) -> None:
        """Nothing follows."""
        self._file.close()


class Script:
    """The replaying end: says what may happen next."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self._events = deque(events)

    @classmethod
    def of(cls, run: str, *, server: int) -> Script:
        """The order that `run` recorded. Raises RunError where it cannot be replayed."""
        path = order_file(Path(run) / "server", server)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            events = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be replayed: {error}") from None
        joins = [(e["position"], e["replica"]) for e in events if e["event"] == "join"]
        if len(joins) != len(set(joins)):
            raise RunError(
                f"{path}: cannot be replayed: the run was resumed, or a worker was replaced, and "
                "what it had computed is not known; replay a run that went through"
            )
        return cls([e for e in events if e["event"] not in ("leave", "stop")])

    def is_next(self, event: dict[str, Any]) -> bool:
        """Whether `event` comes next. After the end of the record everything may happen."""
        return not self._events or self._events[0] == event

    def take(self, event: dict[str, Any]) -> bool:
        """Let `event` happen if it comes next; whether it does."""
        if not self.is_next(event):
            return False
        if self._events:
            self._events.popleft()
        return True
