"""The files of a run that one rank writes: on this disk, or where who started it keeps them.

Where hosts share no storage the rank that writes may be on any of them, and another one tomorrow.
So it says what it would write, and the coordinator writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from shoal.observe.events import (
    JsonLines,
    Report,
    Row,
    RunFiles,
    Sink,
    cut_after,
    read_lines,
    write_shown,
)

_CALLS = ("begin", "sample", "shown")


class Record(Sink, ABC):
    """What a writer asks for, besides rows and events."""

    @abstractmethod
    def begin(self, *, step: int, anew: bool, samples: str, header: Row, missing: Row) -> list[Row]:
        """Write from `step` on; what there is of later steps is about to be done again, and goes.

        `anew`: nothing stands. `samples`: name of the file of samples, which begins with `header`.
        `missing`: rows that the writer before did not come to, as `rows`, and the row of samples of
        the last step as `sample`, if there are any. Returns rows and events that were written by
        it, as messages of a report.
        """

    @abstractmethod
    def knows(self, row: Row) -> bool:
        """Whether this is an evaluation that was written before the rank that made it died."""

    @abstractmethod
    def sample(self, row: Row) -> None:
        """What a step has read."""

    @abstractmethod
    def shown(self, shown: Row) -> None:
        """What the task's picture is drawn of."""


class RunRecord(Record):
    """On this disk."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._files: RunFiles | None = None
        self._samples: JsonLines | None = None

    def begin(self, *, step: int, anew: bool, samples: str, header: Row, missing: Row) -> list[Row]:
        self.close()
        metrics, file = self._run / "metrics.jsonl", self._run / samples
        dropped = cut_after(metrics, step=-1 if anew else step, metrics=True)
        cut_after(file, step=step - 1)  # counts from 0
        self._files, self._samples = RunFiles(self._run), JsonLines(file)
        self._samples.append(header)
        told = [_event("redone", {"step": step, "rows": dropped})] if dropped else []
        told += self._complete(step, file, missing) if missing else []
        for message in told:
            self.hear(message)
        return told

    def _complete(self, step: int, file: Path, missing: Row) -> list[Row]:
        """Add the rows that are missing, in order, each step once."""
        assert self._samples is not None and self._files is not None, "opened"
        known = [row["step"] for row in read_lines(file) if "step" in row]
        if step - 1 not in known[-2:] and missing["sample"] is not None:
            self._samples.append(missing["sample"])
        steps = (row["step"] for row in read_lines(self._run / "metrics.jsonl") if "loss" in row)
        logged = max(steps, default=0)
        rows = [row for row in missing["rows"] if row["step"] > logged]
        told = [{"kind": "row", "row": row} for row in rows]
        if rows and rows[0]["step"] > logged + missing["every"]:
            between = f"{logged + 1} to {rows[0]['step'] - 1}"
            text = f"nobody has the rows of steps {between} any more: {missing['kept']} are kept"
            told.append(_event("rows-lost", {"step": step, "text": text}))
        return told

    def knows(self, row: Row) -> bool:
        known = read_lines(self._run / "metrics.jsonl")[-3:] if "evaluation_loss" in row else []
        return any(each["step"] == row["step"] and "evaluation_loss" in each for each in known)

    def row(self, row: Row) -> None:
        self._open().row(row)

    def event(self, name: str, fields: Row) -> None:
        self._open().event(name, fields)

    def sample(self, row: Row) -> None:
        assert self._samples is not None, "opened"
        self._samples.append(row)

    def shown(self, shown: Row) -> None:
        write_shown(self._run, shown)

    def close(self) -> None:
        for each in (self._files, self._samples):
            if each is not None:
                each.close()
        self._files = self._samples = None

    def _open(self) -> RunFiles:
        self._files = self._files or RunFiles(self._run)
        return self._files

    def hear(self, message: Row) -> list[Row]:
        """Write what a `ToldRecord` has said, or any message with a row or an event; else nothing.

        Returns what that came to, as messages of a report.
        """
        kind = message["kind"]
        if kind == "row":
            self.row(message["row"])
        elif kind == "event":
            self.event(message["name"], message["fields"])
        elif kind == "record" and message["call"] in _CALLS:
            found: list[Row] | None = getattr(self, message["call"])(**message["given"])
            return found or []
        return []


class ToldRecord(Record):
    """Where who hears `report` keeps it. Rows and events it hears of in any case."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def begin(self, **given: Any) -> list[Row]:
        self._report.say("record", call="begin", given=given)
        return []

    def sample(self, row: Row) -> None:
        self._report.say("record", call="sample", given={"row": row})

    def shown(self, shown: Row) -> None:
        self._report.say("record", call="shown", given={"shown": shown})

    def knows(self, row: Row) -> bool:
        return False  # who keeps it looks

    def row(self, row: Row) -> None:
        return

    def event(self, name: str, fields: Row) -> None:
        return


def _event(name: str, fields: Row) -> Row:
    return {"kind": "event", "name": name, "fields": fields}
