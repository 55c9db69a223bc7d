"""Who keeps the others waiting: names a worker that is slower than the rest, step after step."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from typing import Any

WINDOW = 5
RATIO = 1.5
LEAST_SECONDS = 0.05
"""Differences below this are noise of the machine."""
QUIET_STEPS = 50
"""A worker is named again only after so many steps."""


class Pace:
    """The recent compute seconds of every rank."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._generation = 0
        self._named: dict[int, int] = {}

    def note(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Take in one rank's step; the fields of an event when that rank is slow, else None."""
        if message["generation"] != self._generation:
            self._generation = message["generation"]
            self._recent.clear()
        rank, step = message["rank"], message["step"]
        self._recent[rank].append(message["compute_seconds"])
        if len(self._recent[rank]) < WINDOW or len(self._recent) < 2:
            return None
        own = statistics.median(self._recent[rank])
        rest = statistics.median(
            statistics.median(theirs) for other, theirs in self._recent.items() if other != rank
        )
        slow = own > RATIO * rest and own - rest > LEAST_SECONDS
        if not slow or step - self._named.get(rank, -QUIET_STEPS) < QUIET_STEPS:
            return None
        self._named[rank] = step
        text = f"worker {rank} takes {own:.2f} s a step, the others {rest:.2f} s, and they wait"
        return {"rank": rank, "step": step, "seconds": own, "others_seconds": rest, "text": text}
