"""A phase of work that lasts: said when it begins, and again, ever less often, while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_SECONDS = 3.0
"""No phase is silent for longer at first; after each line that it goes on twice as long."""


class Lasting:
    """Says what is done and how far it is; whoever does the work calls `at` now and then."""

    def __init__(
        self, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        self._doing, self._since, self._due = "", 0.0, 0.0

    def begin(self, doing: str) -> None:
        """Another phase."""
        self._doing, self._since = doing, self._clock()
        self._due = self._since + PATIENCE_SECONDS
        self._say(doing)

    def at(self, share: float) -> None:
        """Say so, if it is time; `share` of 1 is done."""
        now = self._clock()
        if now >= self._due:
            took = now - self._since
            self._due = self._since + 2 * took
            self._say(f"{self._doing}: {took:.0f} s so far, {share:.0%} done")
