"""Rows of a run or a server, and events, as the page draws them: columns, thinned where many.

What cannot be read as expected is counted and left out: a crash leaves half lines, and a newer
version may write what this one does not know.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

COLUMNS = (
    "loss",
    "tokens",
    "step_seconds",
    "compute_seconds",
    "communication_seconds",
    "waiting_seconds",
)
BUCKETS = 1200
"""A screen has not many more columns of pixels."""
_EVENT_FIELDS = ("event", "happened_at", "step", "rank", "seconds", "rows", "generation", "members")
_HOST_FIELDS = ("host", "hosts")
_TEXT = 400
_MOST_EVENTS = 2000
_MOST_TEXTS, _MOST_PAIRS, _PAIR_TEXT = 200, 16, 2000


class _Row(msgspec.Struct, gc=False):
    step: int
    loss: float | None = None
    evaluation_loss: float | None = None
    tokens: float | None = None
    step_seconds: float | None = None
    compute_seconds: float | None = None
    communication_seconds: float | None = None
    waiting_seconds: float | None = None
    seconds: float | None = None
    """Of an evaluation alone."""


class _Times(msgspec.Struct, gc=False):
    median: float
    p95: float


class _Served(msgspec.Struct, gc=False):
    """A row of a server's record."""

    at: float
    seconds: float
    requests: int = 0
    made_tokens: int = 0
    running: int = 0
    waiting: int = 0
    first_token_seconds: _Times | None = None
    answer_seconds: _Times | None = None


_DECODE = msgspec.json.Decoder(_Row).decode
_SERVED = msgspec.json.Decoder(_Served).decode
_UNREADABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def columns(lines: Sequence[bytes], *, last_step: int) -> tuple[dict[str, Any], int]:
    """What a browser gets of new lines of metrics.jsonl, and the last step in them.

    `steps` are columns, `elapsed` among them: seconds since the row before. Many rows are thinned
    to an envelope. `evaluations` and `newest` are rows as they were written; `broken` counts lines.
    """
    rows: list[_Row] = []
    evaluations, newest, broken = [], b"", 0
    clock, times, before = 0.0, [], last_step
    for line in lines:
        try:
            row = _DECODE(line)
        except _UNREADABLE:
            broken += bool(line.strip())
            continue
        if row.evaluation_loss is not None or row.seconds is not None:
            evaluations.append(json.loads(line))
            continue
        rows.append(row)
        newest, step = line, row.step
        clock += (row.step_seconds or 0.0) * (step - before if step > before else 1)
        times.append(clock)
        before = step
    kept = envelope([row.loss for row in rows])
    starts = [0.0, *(times[at] for at in kept)]
    steps: dict[str, list[Any]] = {
        name: [getattr(rows[at], name) for at in kept] for name in ("step", *COLUMNS)
    }
    steps["elapsed"] = [times[at] - start for at, start in zip(kept, starts)]
    found = {
        "steps": steps,
        "evaluations": _with_texts(evaluations),
        "newest": json.loads(newest) if newest else None,
        "broken": broken,
        "of": len(rows),
    }
    return found, before


def served(lines: Sequence[bytes]) -> dict[str, Any]:
    """What a browser gets of new lines of serving.jsonl: columns, thinned where they are many.

    `first_token` and `answer` are the seconds that 95 of 100 stay within; `newest` is the last row
    as it was written.
    """
    found: list[_Served] = []
    newest, broken = b"", 0
    for line in lines:
        try:
            row = _SERVED(line)
        except _UNREADABLE:
            broken += bool(line.strip())
            continue
        if row.seconds > 0:
            found.append(row)
            newest = line
    kept = [found[at] for at in envelope([_p95(each.answer_seconds) for each in found])]
    columns: dict[str, list[Any]] = {
        "at": [each.at for each in kept],
        "requests_per_second": [each.requests / each.seconds for each in kept],
        "tokens_per_second": [each.made_tokens / each.seconds for each in kept],
        "running": [each.running for each in kept],
        "waiting": [each.waiting for each in kept],
        "first_token": [_p95(each.first_token_seconds) for each in kept],
        "answer": [_p95(each.answer_seconds) for each in kept],
    }
    latest = json.loads(newest) if newest else None
    return {"served": columns, "newest": latest, "broken": broken, "of": len(found)}


def _p95(times: _Times | None) -> float | None:
    return None if times is None else times.p95


def envelope(losses: Sequence[float | None], *, buckets: int = BUCKETS) -> list[int]:
    """Which of many rows to draw so that the picture stays: of each of `buckets` neighbourhoods
    the first, the lowest and the highest, and the last of all. All of them where they are few."""
    count = len(losses)
    if count <= 4 * buckets:
        return list(range(count))
    kept = {count - 1}
    for number in range(buckets):
        start, stop = count * number // buckets, count * (number + 1) // buckets
        kept.add(start)
        finite = [at for at in range(start, stop) if losses[at] is not None]
        if finite:
            kept |= {min(finite, key=losses.__getitem__), max(finite, key=losses.__getitem__)}  # type: ignore[arg-type]
    return sorted(kept)


def _with_texts(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations with their pairs of prompt and text, cut to what a person would read."""
    for at, row in enumerate(evaluations):
        pairs = row.pop("completions", None)
        if isinstance(pairs, list) and at >= len(evaluations) - _MOST_TEXTS:
            row["completions"] = [
                [str(text)[:_PAIR_TEXT] for text in pair[:2]]
                for pair in pairs[:_MOST_PAIRS]
                if isinstance(pair, list)
            ]
    return evaluations


def events(lines: Sequence[bytes]) -> tuple[list[dict[str, Any]], int]:
    """New lines of events.jsonl, the last of very many, and how many could not be read."""
    found, broken = [], 0
    for line in lines[-_MOST_EVENTS:]:
        try:
            tree = json.loads(line)
            name = tree["event"]
        except (ValueError, RecursionError, KeyError, TypeError):
            broken += bool(line.strip())
            continue
        row = {key: tree[key] for key in (*_EVENT_FIELDS, *_HOST_FIELDS) if key in tree}
        text = tree.get("text", "")
        if name == "changed":
            text = f"{tree.get('key')}: {tree.get('before')} -> {tree.get('after')}"
        found.append({**row, "event": str(name), "text": str(text)[:_TEXT]})
    return found, broken
