"""Spans of a run as a Chrome trace (chrome://tracing, Perfetto): RUN/trace.json, when asked.

Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Span = dict[str, Any]

MOST_SPANS = 20_000
"""Spans kept per rank: the first ones; a longer run says how many were left out."""

STREAMS = ("compute", "communication")
"""Rows of a rank. What is sent while the rank computes has a row of its own in viewers: it is
written as an asynchronous pair of events."""


class Trace:
    """Collects the spans of one rank. Off, it costs one comparison per span."""

    def __init__(self, *, on: bool = False, rank: int = 0) -> None:
        self.on, self._rank = on, rank
        self.spans: list[Span] = []
        self.left_out = 0
        self._pairs = 0

    @contextmanager
    def span(self, name: str, **about: Any) -> Iterator[None]:
        """Time what happens inside, under the loop's own word for it."""
        if not self.on:
            yield
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, began, time.perf_counter(), about)

    def sent(self, name: str, *, began: float, waited: float, ended: float, num_bytes: int) -> None:
        """An exchange with other ranks, which was waited for since `waited` (perf_counter)."""
        about = {"bytes": num_bytes}
        self._add(name, waited, ended, about, stream="communication")
        if waited > began:
            self._pairs += 1
            pair: Span = {"name": name, "cat": "in flight", "id": f"{self._rank}.{self._pairs}"}
            pair |= {"pid": self._rank, "tid": len(STREAMS)}
            self._keep({**pair, "ph": "b", "ts": began * 1e6, "args": about})
            self._keep({**pair, "ph": "e", "ts": ended * 1e6})

    def _add(
        self, name: str, began: float, ended: float, about: Span, *, stream: str = "compute"
    ) -> None:
        at = {"ts": began * 1e6, "dur": (ended - began) * 1e6}
        row = {"pid": self._rank, "tid": STREAMS.index(stream)}
        self._keep({"name": name, "ph": "X", **at, **row, "args": about})

    def _keep(self, event: Span) -> None:
        if len(self.spans) >= MOST_SPANS:
            self.left_out += 1
        else:
            self.spans.append(event)


def write_trace(path: Path, found: Sequence[tuple[list[Span], int]]) -> None:
    """Write all ranks' spans: a rank is shown as a process, each of its streams as a row.

    `found`: of each rank its spans, and how many it left out.
    """
    spans = [span for theirs, _ in found for span in theirs]
    left_out = sum(count for _, count in found)
    names: list[Span] = []
    for rank in sorted({span["pid"] for span in spans}):
        names.append(_name("process_name", f"worker {rank}", pid=rank, tid=0))
        names += [
            _name("thread_name", stream, pid=rank, tid=row) for row, stream in enumerate(STREAMS)
        ]
    content = {"traceEvents": [*names, *spans], "otherData": {"spans_left_out": left_out}}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def trace_path(run: Path, *, part: int | None = None) -> Path:
    """The trace of a run. `part`: the first rank of a replica that meets the others at servers
    only, and leaves its spans by themselves."""
    return run / ("trace.json" if part is None else f"trace-from-rank-{part}.json")


def merge_parts(run: Path) -> None:
    """Put what the replicas of a run have left into one trace, if any has."""
    whole, parts = trace_path(run), sorted(run.glob("trace-from-rank-*.json"))
    if not parts or not whole.is_file():
        return
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (whole, *parts)]
    events = [event for each in found for event in each["traceEvents"]]
    left_out = sum(each["otherData"]["spans_left_out"] for each in found)
    content = {"traceEvents": events, "otherData": {"spans_left_out": left_out}}
    whole.write_text(json.dumps(content) + "\n", encoding="utf-8")
    for path in parts:
        path.unlink()


def _name(kind: str, name: str, *, pid: int, tid: int) -> Span:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
