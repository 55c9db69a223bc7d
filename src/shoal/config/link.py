"""A link between replicas in words: `20Mbit/s,10ms`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_RATES = {"kbit/s": 125.0, "mbit/s": 125e3, "gbit/s": 125e6, "kb/s": 1e3, "mb/s": 1e6, "gb/s": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Link:
    """What each pair of workers of different replicas has, each way."""

    bytes_per_second: float
    delay_seconds: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Link:
        """`20Mbit/s`, or with a delay one way, `20Mbit/s,10ms`. Raises ValueError."""
        number = r"(\d+(?:\.\d+)?)\s*"
        found = re.fullmatch(rf"{number}([a-zA-Z]+/s)(?:\s*,\s*{number}([a-zA-Z]+))?", text.strip())
        rate = _RATES.get(found[2].lower()) if found else None
        time = _TIMES.get(found[4].lower()) if found and found[4] else 0.0
        if found is None or rate is None or time is None or float(found[1]) <= 0:
            raise ValueError(
                f"expected a rate and perhaps a delay, such as 20Mbit/s,10ms; got {text!r}"
            )
        return cls(float(found[1]) * rate, float(found[3] or 0) * time)
