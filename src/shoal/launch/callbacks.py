"""Functions of the user's that hear of a run while it goes on, in his own process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shoal.errors import UserError, nearest

NAMES = ("on_step", "on_evaluation", "on_save")


class Callbacks:
    """Calls `on_step(row)`, `on_evaluation(row)` and `on_save(fields)` with plain data.

    Rows are those of metrics.jsonl. The first error of a function asks the run to save and stop;
    whoever started the run raises it then.
    """

    def __init__(self, given: Mapping[str, Callable[[dict[str, Any]], object]] | None) -> None:
        """Raises UserError for a name that nothing is called by."""
        self._given = dict(given or {})
        self.error: Exception | None = None
        self.stop: Callable[[], object] = lambda: None
        """Asks the run to save and stop."""
        self.evaluated: Callable[[], object] = lambda: None
        """Ours: an evaluation was written."""
        for name, function in self._given.items():
            if name not in NAMES:
                raise UserError(f"callbacks: unknown {name!r}; {nearest(name, NAMES)}")
            if not callable(function):
                raise UserError(f"callbacks: {name} is no function, but {function!r}")

    def hear(self, message: Mapping[str, Any]) -> None:
        """Call what a worker's message is for."""
        if message["kind"] == "row":
            row = message["row"]
            if "evaluation_loss" in row:
                self.evaluated()
            self._call("on_evaluation" if "evaluation_loss" in row else "on_step", row)
        elif message["kind"] == "event" and message["name"] == "saved":
            self._call("on_save", message["fields"])

    def _call(self, name: str, data: Mapping[str, Any]) -> None:
        if self.error is not None or name not in self._given:
            return
        try:
            self._given[name](dict(data))
        except Exception as error:
            self.error = error
            self.stop()

    def check(self, *, advice: str) -> None:
        """Raise what a function has raised, with `advice` as a note."""
        if self.error is not None:
            self.error.add_note(advice)
            raise self.error
