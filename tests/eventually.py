"""Waiting for what another thread or process will have done."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def eventually(what: Callable[[], Any], *, seconds: float = 30.0) -> Any:
    """What `what` gives once that is true; an AssertionError where it is not within `seconds`."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
    return found
