"""What a person sees while a run goes on: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import TextIO

from shoal.observe.events import Row, Sink
from shoal.units import format_count, format_seconds


class Console(Sink):
    """Prints phases, a progress line, evaluations with their samples, and events worth a line."""

    def __init__(
        self, *, steps: int | None = None, out: TextIO | None = None, lines_every_seconds: float = 5
    ) -> None:
        self._out = out or sys.stdout
        self._live = self._out.isatty()
        self._every = lines_every_seconds
        self._began = time.monotonic()
        self._last_line = -math.inf
        self._drawn = False
        self._rate: float | None = None
        self.steps = steps

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._drawn:
            self._out.write("\r\x1b[K")
            self._drawn = False
        self._out.write(text + "\n")
        self._out.flush()

    def phase(self, text: str) -> None:
        """Announce what begins, with the time since the start."""
        self.line(f"[{time.monotonic() - self._began:6.1f} s] {text}")

    def row(self, row: Row) -> None:
        if "evaluation_loss" in row:
            self._evaluation(row)
        elif "loss" in row:
            self._step(row)

    def _step(self, row: Row) -> None:
        seconds = row.get("step_seconds") or 0.0
        if row["step"] > 1:  # the first step also warms up
            self._rate = seconds if self._rate is None else 0.9 * self._rate + 0.1 * seconds
        left = ""
        if self.steps and self._rate is not None:
            left = format_seconds(max(0, self.steps - row["step"]) * self._rate) + " left"
        loss = row["loss"] if row["loss"] is not None else math.nan
        speed = format_count(row.get("tokens_per_second") or 0)
        of = f"/{self.steps}" if self.steps else ""
        text = f"step {row['step']:>5}{of}  loss {loss:.4f}  {speed} tokens/s  {left}"
        now = time.monotonic()
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._out.write("\r\x1b[K" + text[:width])
            self._out.flush()
            self._drawn = True
        elif now - self._last_line >= self._every or row["step"] in (1, self.steps):
            self._last_line = now
            self.line(text.rstrip())

    def _evaluation(self, row: Row) -> None:
        skip = {"step", "samples", "seconds", "tokens", "completions"}
        parts = [
            f"{key.replace('_', ' ')} {value:.4g}"
            for key, value in row.items()
            if key not in skip and isinstance(value, float)
        ]
        self.line(f"step {row['step']:>5}  evaluation: " + ", ".join(parts))
        for prompt, completion in row.get("completions") or []:
            shown = (prompt + completion).strip().replace("\n", "\n      | ")
            self.line("      | " + shown)

    def event(self, name: str, fields: Row) -> None:
        text = fields.get("text")
        if text:
            self.line(f"{name}: {text}")
