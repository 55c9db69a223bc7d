"""A worker for tests, without torch: says where it is, repeats its orders, ends when told to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from shoal.observe.events import Report
from shoal.observe.pulse import Pulse


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point, started by the fork server."""
    report, text = Report(descriptor), b""
    Pulse(Path(payload["pulse"]), slot=payload["rank"]).mark("forward", step=7)
    report.say("here", keys=sorted(path.name for path in Path(payload["keys"]).iterdir()))
    while data := os.read(descriptor, 1 << 16):
        *lines, text = (text + data).split(b"\n")
        for order in map(json.loads, lines):
            report.say("heard", order=order["order"])
            if order["order"] == "stop":
                return 3
    return 0
