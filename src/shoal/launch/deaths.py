"""Why a worker ended: a signal, an error, no memory, or a quiet exit before its time."""

from __future__ import annotations

import re
import signal
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_COUNTERS = (
    "/sys/fs/cgroup/memory.events",
    "/sys/fs/cgroup/memory/memory.oom_control",
    "/proc/vmstat",
)
_KILLS = re.compile(rb"^oom_kill (\d+)$", re.MULTILINE)


def oom_kills() -> int:
    """Processes that the system has ended for want of memory, as far as it says so here."""
    total = 0
    for path in _COUNTERS:
        with suppress(OSError), open(path, "rb") as file:  # asked for several times a second
            found = _KILLS.search(file.read())
            total += int(found[1]) if found else 0
    return total


@dataclass(frozen=True)
class Death:
    """One worker's end before its time."""

    rank: int
    kind: str
    """killed, stuck, host, error, out-of-memory, exited"""
    text: str
    step: int
    where: str
    trace: str = ""
    place: str = ""
    """Of an error that came of itself: its type, message and line."""


def death_of(
    *,
    rank: int,
    status: int,
    step: int,
    where: str,
    error: dict[str, Any] | None,
    stuck: str | None,
    ran_out: bool,
    gone: str | None = None,
) -> Death:
    """What to call the end of worker `rank`.

    `status`: its exit status, or minus a signal. `error`: what it said last of itself. `stuck`:
    why we ended it. `gone`: why its host counts as gone. `ran_out`: whether the system ended a
    process for want of memory meanwhile.
    """
    if gone is not None:
        return Death(rank, "host", f"worker {rank} is lost: its host {gone}", step, where)
    if stuck is not None:
        return Death(rank, "stuck", f"worker {rank} {stuck}", step, where)
    if error is not None:
        kind = "out-of-memory" if error.get("out_of_memory") else "error"
        text = f"worker {rank}: {error['text']}"
        place = error.get("place", "") if kind == "error" and error.get("cause") else ""
        return Death(rank, kind, text, step, where, error.get("trace", ""), place)
    if status < 0:
        name = signal.Signals(-status).name
        if ran_out and name == "SIGKILL":
            text = f"worker {rank} was killed by the system, which ran out of memory"
            return Death(rank, "out-of-memory", text, step, where)
        return Death(rank, "killed", f"worker {rank} was killed ({name})", step, where)
    text = f"worker {rank} ended with status {status} before its time"
    return Death(rank, "exited", text, step, where)
