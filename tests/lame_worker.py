"""A worker for tests: of a job of two, rank 1 is killed while rank 0 waits for it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point, started by the fork server."""
    if payload["rank"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return 0
