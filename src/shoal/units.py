"""Quantities as people write and read them: counts, bytes, durations."""

from __future__ import annotations

import re

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | _BINARY
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def _split(text: str) -> tuple[float, str]:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a number with a unit")
    return float(match[1]), match[2].lower()


def parse_count(text: str) -> int:
    """`"2B"` -> 2_000_000_000. Suffixes k, M, B (or G), T are decimal. Raises ValueError."""
    value, unit = _split(text)
    if unit not in _DECIMAL:
        raise ValueError(f"{text!r}: unknown suffix {unit!r}; use k, M, B or T")
    return round(value * _DECIMAL[unit])


def parse_bytes(text: str) -> int:
    """`"24 GiB"` -> 25_769_803_776. kB, MB, GB are decimal; KiB, MiB, GiB binary."""
    value, unit = _split(text)
    if unit not in _BYTES:
        raise ValueError(f"{text!r}: unknown unit {unit!r}; use one of {', '.join(_BYTES)}")
    return round(value * _BYTES[unit])


def parse_seconds(text: str) -> float:
    """`"8h"` -> 28800.0. Units s, m, h, d."""
    value, unit = _split(text)
    if unit not in _SECONDS:
        raise ValueError(f"{text!r}: unknown unit {unit!r}; use s, m, h or d")
    return value * _SECONDS[unit]


def format_bytes(num_bytes: float) -> str:
    """`1536` -> `"1.5 KiB"`."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_count(count: float) -> str:
    """`4_200_000` -> `"4.2M"`."""
    value = float(count)
    for unit in ("", "k", "M", "B"):
        if abs(float(f"{value:.3g}")) < 1000:  # 999,999 is 1M, not 1e+03k
            return f"{value:.0f}" if unit == "" else f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def format_seconds(seconds: float) -> str:
    """`3725` -> `"1h 02m"`; `75` -> `"1m 15s"`; `2.5` -> `"2.5 s"`; from three days on in days."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours >= 72:
        return f"{hours / 24:.0f} days"
    return f"{hours}h {minutes:02d}m"
