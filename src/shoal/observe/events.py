"""Rows and events of a run: append-only JSON lines, and what a worker tells its parent."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SHOWN = "shown.json"
"""In a run directory: what the last evaluation has for the task's picture."""


def plain(row: Row) -> Row:
    """`row` with numbers that JSON has no word for (NaN, infinities) as null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


class Sink(ABC):
    """Somewhere numbers go. A sink must not raise because a number is missing."""

    @abstractmethod
    def row(self, row: Row) -> None:
        """A logged step, or an evaluation."""

    def event(self, name: str, fields: Row) -> None:  # noqa: B027 (not every sink has events)
        """Something that happened: a start, a save, a stop."""

    def close(self) -> None:  # noqa: B027 (not every sink holds something open)
        """Nothing follows."""


class JsonLines:
    """A file of JSON objects, one per line, each complete on disk before `append` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_short = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open until `close`)
        if cut_short:  # by a crash: what follows must not join the half line
            self._file.write("\n")

    def append(self, row: Row) -> None:
        """Add one object."""
        self._file.write(json.dumps(plain(row)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def happening(name: str, fields: Row) -> Row:
    """A row of events.jsonl: something that happens now."""
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"event": name, "happened_at": at, **fields}


class RunFiles(Sink):
    """metrics.jsonl and events.jsonl of a run directory."""

    def __init__(self, run: Path) -> None:
        self._metrics = JsonLines(run / "metrics.jsonl")
        self._events = JsonLines(run / "events.jsonl")

    def row(self, row: Row) -> None:
        self._metrics.append(row)

    def event(self, name: str, fields: Row) -> None:
        self._events.append(happening(name, fields))

    def close(self) -> None:
        self._metrics.close()
        self._events.close()


def write_shown(run: Path, shown: Row) -> None:
    """Write what the task's picture is drawn of: whole, or not at all."""
    beside = run / f".{SHOWN}"
    beside.write_text(json.dumps(shown) + "\n", encoding="utf-8")
    os.replace(beside, run / SHOWN)


class Report(Sink):
    """The worker's end of its link to the parent: JSON lines, written whole, by any thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def say(self, kind: str, **fields: Any) -> None:
        """Send a message; a parent that is gone is not an error of the worker."""
        data = json.dumps({"kind": kind, **plain(fields)}).encode() + b"\n"
        with self._lock:  # a pipe takes only short lines in one piece
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except (BrokenPipeError, ConnectionResetError):
                return

    def row(self, row: Row) -> None:
        self.say("row", row=plain(row))

    def event(self, name: str, fields: Row) -> None:
        self.say("event", name=name, fields=plain(fields))


class Tee(Sink):
    """Hands everything to several sinks."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)

    def row(self, row: Row) -> None:
        for sink in self.sinks:
            sink.row(row)

    def event(self, name: str, fields: Row) -> None:
        for sink in self.sinks:
            sink.event(name, fields)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def _is_metrics(row: Row) -> bool:
    """Of a step, its losses numbers or None."""
    losses = (row.get("loss"), row.get("evaluation_loss"))
    return "step" in row and all(isinstance(each, int | float | None) for each in losses)


def read_lines(path: Path) -> list[Row]:
    """The objects of a JSON-lines file; lines that are none are left out, as a crash leaves them.

    So are objects whose `step` is no number.
    """
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step", 0), int):
                rows.append(row)
    return rows


def cut_after(path: Path, *, step: int, metrics: bool = False) -> int:
    """Drop the rows of steps after `step` (they are about to be done again); returns how many.

    `metrics`: what can be no row of metrics.jsonl goes as well.
    """
    rows = read_lines(path)
    kept = [row for row in rows if row.get("step", -1) <= step]
    if metrics:
        kept = [row for row in kept if _is_metrics(row)]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    if not path.is_file() or path.read_bytes() != text.encode():
        beside = path.with_suffix(f".cut-{time.monotonic_ns()}")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    return len(rows) - len(kept)
