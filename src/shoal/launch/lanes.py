"""RUN/workers.json: what each worker does now, for whoever watches the run from outside.

Written by the supervisor of what it has seen anyhow, a few times a second, so that nothing is added
to training. The file is replaced whole each time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal.launch.directory import is_run
from shoal.launch.hang import LONG, WAITS, Sighting

EVERY_SECONDS = 0.25
_SILENT_SECONDS = 2.0
_SILENT_FACTOR = 3.0
"""Times what the phase usually takes: then its worker is called silent."""


class Lanes:
    """Writes the file of one run that has `num_workers` ranks."""

    def __init__(self, run: Path, *, num_workers: int) -> None:
        self._run, self._num_workers = run, num_workers
        self._written = 0.0

    def look(self, seen: Sequence[Sighting]) -> None:
        """Write what was seen, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._written < EVERY_SECONDS or not is_run(self._run):
            return
        self._written = now
        with suppress(OSError):  # a full disk is no reason to end a run
            write_lanes(self._run, lanes(seen, num_workers=self._num_workers))


def write_lanes(folder: Path, found: Sequence[dict[str, Any]]) -> None:
    """Write what was seen of each worker, or of each replica of a server. Raises OSError."""
    tree = {"written_at": time.time(), "workers": found}
    beside = folder / ".workers.json"  # one name: a kill leaves one such file at most
    beside.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    os.replace(beside, folder / "workers.json")


def lanes(seen: Sequence[Sighting], *, num_workers: int) -> list[dict[str, Any]]:
    """One entry a rank: its state, whom it waits for, and where it is."""
    known = {one.rank: one for one in seen}
    return [
        {"rank": rank, **(_lane(known[rank], seen) if rank in known else {"state": "gone"})}
        for rank in range(num_workers)
    ]


def _lane(one: Sighting, seen: Sequence[Sighting]) -> dict[str, Any]:
    beat = one.beat
    if beat is None:
        return {"state": "starts", "silent_seconds": round(one.silent_seconds, 2)}
    state, waits_for = "computes", []
    if one.state == "is stopped" or _is_silent(one):
        state = "silent"
    elif beat.operation:
        waits_for = _missing(beat.collective, seen)
        state = "waits" if waits_for else "communicates"
    elif beat.phase in WAITS:
        state = "waits"
    elif beat.phase == "starting":
        state = "starts"
    return {
        "state": state,
        "waits_for": waits_for,
        "phase": beat.phase,
        "operation": beat.operation,
        "step": beat.step,
        "generation": beat.generation,
        "silent_seconds": round(one.silent_seconds, 2),
    }


def _is_silent(one: Sighting) -> bool:
    """Whether it is quiet for much longer than usual; in a collective it waits for others."""
    beat = one.beat
    if beat is None or beat.operation or beat.phase in WAITS or beat.phase in LONG:
        return False
    usual = beat.expected_seconds
    return usual > 0 and one.silent_seconds > max(_SILENT_SECONDS, _SILENT_FACTOR * usual)


def _missing(collective: int, seen: Sequence[Sighting]) -> list[int]:
    """Ranks that have not come to a collective that others are in."""
    return [
        one.rank
        for one in seen
        if one.beat is None or (not one.beat.operation and one.beat.collective < collective)
    ]
