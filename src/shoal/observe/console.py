"""What a person sees while a run goes on: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, TextIO

from shoal.language import translated
from shoal.observe.events import Row, Sink
from shoal.observe.lasting import PATIENCE_SECONDS
from shoal.observe.visible import visible
from shoal.units import format_count, format_seconds

if TYPE_CHECKING:
    from shoal.observe.progress import Drawing, LiveLine


class Console(Sink):
    """Prints phases, progress, evaluations with their samples, and events worth a line.

    Use as a context manager, or `close` it, before anything else writes to the terminal.
    """

    def __init__(
        self, *, steps: int | None = None, out: TextIO | None = None, lines_every_seconds: float = 5
    ) -> None:
        self._out = out or sys.stdout
        self._live = _live_line(self._out)
        self._every = lines_every_seconds
        self._began = time.monotonic()
        self._last_line = -math.inf
        self._rate: float | None = None
        self._doing = ""
        self._done: float | None = None
        self._doing_since = self._began
        self._last_step: Drawing | None = None
        self._remind_at = math.inf
        self._lock = threading.RLock()
        self._watch: threading.Thread | None = None
        self.steps = steps

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the live line: what anybody prints now stands on a line of its own."""
        with self._lock:
            self._doing, self._remind_at = "", math.inf
            if self._live is not None:
                self._live.end()

    def line(self, text: str, *, verbatim: bool = False) -> None:
        """A line that stays, in the language chosen. Control characters are shown, not sent.

        `verbatim`: it is what a model or a person wrote, and stays as it is.
        """
        text = visible(text if verbatim else translated(text))
        with self._lock:
            if self._live is not None:
                self._live.print(text)
            else:
                self._out.write(text + "\n")
            self._out.flush()

    def phase(self, text: str) -> None:
        """Announce what begins, with the time since the start."""
        with self._lock:
            self.line(f"[{time.monotonic() - self._began:6.1f} s] {translated(text)}")
            self._begin(text)

    def progress(self, text: str, done: float | None) -> None:
        """How far the phase `text` is (0 to 1; None: unknown); a new one begins without a line."""
        with self._lock:
            if text != self._doing:
                self._begin(text)
            self._done = done

    def row(self, row: Row) -> None:
        if "evaluation_loss" in row:
            self._evaluation(row)
        elif "loss" in row:
            self._step(row)

    def event(self, name: str, fields: Row) -> None:
        text = fields.get("text")
        if name == "resumed" and not text:
            text = f"going on after step {fields.get('step')}"
        if text:
            self.line(f"{name}: {text}")

    # --- what goes on

    def _begin(self, text: str) -> None:
        self._doing, self._done, self._doing_since = text, None, time.monotonic()
        self._remind_at = self._doing_since + PATIENCE_SECONDS
        if self._live is not None:
            self._live.show(self._draw_phase)
        elif self._watch is None:
            self._watch = threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True)
            self._watch.start()

    def _draw_phase(self) -> Drawing:
        seconds = format_seconds(time.monotonic() - self._doing_since)
        share = "" if self._done is None else f"{self._done:.0%}"
        return [(0, visible(translated(self._doing))), (1, share), (2, seconds)], self._done

    def remind(self) -> None:
        """Say that a phase goes on, when it was silent for long."""
        with self._lock:
            if self._live is not None or time.monotonic() < self._remind_at:
                return
            took = time.monotonic() - self._doing_since
            self._remind_at = self._doing_since + 2 * took
            share = "" if self._done is None else f", {self._done:.0%} done"
            self.line(f"           {self._doing}: {took:.0f} s so far{share}")

    # --- rows

    def _step(self, row: Row) -> None:
        seconds = row.get("step_seconds") or 0.0
        if row["step"] > 1:  # the first step also warms up
            self._rate = seconds if self._rate is None else 0.9 * self._rate + 0.1 * seconds
        fields = self._fields(row)
        with self._lock:
            self._last_step = fields, row["step"] / (self.steps or math.inf)
            now = time.monotonic()
            due = now - self._last_line >= self._every or row["step"] in (1, self.steps)
            if self._live is None and due:
                self._last_line = now
                said = (translated(text) for rank, text in fields if rank < _OF_TERMINALS)
                self.line("  ".join(said), verbatim=True)
            self._stepping()

    def _stepping(self) -> None:
        """Between two rows, the last one stays."""
        self._doing, self._remind_at = "", math.inf
        drawing = self._last_step
        if self._live is not None and drawing is not None:
            fields, done = drawing
            said = [(rank, translated(text)) for rank, text in fields]
            self._live.show(lambda: (said, done))

    def _fields(self, row: Row) -> list[tuple[int, str]]:
        """What is said of a step, each with how important it is (progress.py)."""
        loss = row["loss"] if row["loss"] is not None else math.nan
        fields = [
            (0, f"step {row['step']:>5}" + (f"/{self.steps}" if self.steps else "")),
            (1, f"loss {loss:.4f}"),
            (5, f"rate {row.get('learning_rate') or 0.0:.2e}"),
            (6, f"norm {row.get('gradient_norm') or 0.0:.3g}"),
            (4, f"{format_count(row.get('tokens_per_second') or 0)} tokens/s"),
        ]
        if self.steps and self._rate is not None:
            seconds = max(0, self.steps - row["step"]) * self._rate
            fields.append((2, f"{format_seconds(seconds)} left"))
        return fields

    def _evaluation(self, row: Row) -> None:
        parts = [
            f"{key.removeprefix('evaluation_').replace('_', ' ')} {value:.4g}"
            for key, value in row.items()
            if isinstance(value, float) and not key.endswith(("seconds", "targets"))
        ]
        self.line(f"evaluation at step {row['step']}: " + ", ".join(parts))
        for prompt, completion in row.get("completions") or []:
            for name, text in (("prompt", prompt), ("completion", completion)):
                shown = text.strip().replace("\n", f"\n  {'':<10} | ")
                self.line(f"  {name:<10} | {shown}", verbatim=True)
        with self._lock:
            self._stepping()


_OF_TERMINALS = 5
"""Fields at least this unimportant are shown on terminals only."""


def _live_line(out: TextIO) -> LiveLine | None:
    """The live line of a terminal that can redraw one; None elsewhere."""
    if not out.isatty():
        return None
    from shoal.observe.progress import LiveLine  # imports rich, which takes a while

    found = LiveLine(out)
    return found if found.able else None


def _watch(console: weakref.ref[Console]) -> None:
    """Watch over a console until nobody holds it any more."""
    while (held := console()) is not None:
        held.remind()
        del held
        time.sleep(0.5)
