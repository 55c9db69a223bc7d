"""Spans of a run as a Chrome trace (chrome://tracing, Perfetto): RUN/trace.json, when asked.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Span = dict[str, Any]

MOST_SPANS = 20_000
"""Spans kept per rank: the first ones; a longer run says how many were left out."""


class Trace:
    """Collects the spans of one rank. Off, it costs one comparison per span."""

    def __init__(self, *, on: bool, rank: int) -> None:
        self._on, self._rank = on, rank
        self.spans: list[Span] = []
        self.left_out = 0

    @contextmanager
    def span(self, name: str, **about: Any) -> Iterator[None]:
        """Time what happens inside, under the loop's own word for it."""
        if not self._on:
            yield
            return
        began = time.monotonic_ns()
        try:
            yield
        finally:
            self._add(name, began, time.monotonic_ns() - began, about)

    def _add(self, name: str, began: int, lasted: int, about: dict[str, Any]) -> None:
        if len(self.spans) >= MOST_SPANS:
            self.left_out += 1
            return
        span = {"name": name, "ph": "X", "ts": began / 1000, "dur": lasted / 1000}
        self.spans.append({**span, "pid": 0, "tid": self._rank, "args": about})


def write_trace(path: Path, spans: list[Span], *, left_out: int) -> None:
    """Write all ranks' spans; a rank is shown as a thread."""
    ranks = sorted({span["tid"] for span in spans})
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": r, "args": {"name": f"worker {r}"}}
        for r in ranks
    ]
    content = {"traceEvents": [*names, *spans], "otherData": {"spans_left_out": left_out}}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
