"""What requests came to of late: numbers that who answers leaves, and who records takes away."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

_MOST = 10_000
"""Kept of each where nobody takes them."""


@dataclass
class Lately:
    """Filled and emptied by different threads."""

    came: int = 0
    """Requests so far."""
    refused: int = 0
    """Of these, told to come again, since the queue was full."""
    first_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST))
    """To the first token."""
    ended: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=_MOST))
    """Seconds of whole requests, and how they ended."""

    def take(self) -> tuple[list[float], list[tuple[float, str]]]:
        """Seconds to first tokens, and requests that ended, since this was asked last."""
        first = [self.first_seconds.popleft() for _ in range(len(self.first_seconds))]
        return first, [self.ended.popleft() for _ in range(len(self.ended))]
