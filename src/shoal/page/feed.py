"""What one open page is told, event by event, of the runs it shows: rows, events, states, workers.

The id of each event is the place in every file of these runs, so a browser that comes again goes
on there. Everything else is sent whole whenever it has changed.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.page import rows, shelf
from shoal.page.shelf import Shelf
from shoal.page.tail import Place, read_on
from shoal.page.web import Event

MOST_SHOWN = 8
_LIST_SECONDS = 2.0
_STATE_SECONDS = 0.5


@dataclass
class _Shown:
    """One run of the page: how far each file was read."""

    name: str
    folder: Path
    metrics: Place
    """In metrics.jsonl; in serving.jsonl of a server."""
    events: Place


class Feed:
    """The stream of one page. `resumed`: the id of the last event that its browser has had."""

    def __init__(self, runs: Shelf, names: Sequence[str], *, resumed: str = "") -> None:
        self._shelf = runs
        self._places = _places(resumed)
        self._missing = list(dict.fromkeys(names[:MOST_SHOWN]))
        self._shown: list[_Shown] = []
        self._sent: dict[tuple[str, str], Any] = {}
        self._due: dict[str, float] = {}

    def poll(self) -> list[Event]:
        """What is new since the last call."""
        new = []
        if self._is_due("runs", _LIST_SECONDS):
            known = self._shelf.runs()
            new += self._changed("runs", "", self._list(known))
            self._meet(known)
        for name in self._missing:
            new += self._changed("state", name, {"gone": True, "problems": []})
        states = self._is_due("states", _STATE_SECONDS)
        for one in self._shown:
            if states:
                new += self._changed("state", one.name, self._shelf.state(one.folder))
            new += self._changed("workers", one.name, shelf.workers(one.folder))
            new += self._new_rows(one)
            new += self._new_events(one)
        return new

    def _new_rows(self, one: _Shown) -> list[Event]:
        if shelf.is_record(one.folder):
            lines, one.metrics, anew = read_on(one.folder / "serving.jsonl", one.metrics)
            return self._read(one, "served", anew, rows.served(lines)) if lines or anew else []
        lines, place, anew = read_on(one.folder / "metrics.jsonl", one.metrics)
        found, step = rows.columns(lines, last_step=place.step)
        one.metrics = replace(place, step=step)
        return self._read(one, "rows", anew, found) if lines or anew else []

    def _new_events(self, one: _Shown) -> list[Event]:
        lines, one.events, anew = read_on(one.folder / "events.jsonl", one.events)
        found, broken = rows.events(lines)
        told = {"events": found, "broken": broken}
        return self._read(one, "events", anew, told) if lines or anew else []

    def _read(self, one: _Shown, kind: str, anew: bool, found: dict[str, Any]) -> list[Event]:
        """`anew`: the browser forgets what it has had of this file."""
        return [Event({"run": one.name, "anew": anew, **found}, self._id(), kind)]

    def _meet(self, known: dict[str, Path]) -> None:
        """Begin with runs that are asked for and have come into being."""
        for name in [name for name in self._missing if name in known]:
            self._missing.remove(name)
            places = self._places.get(_mark(name), (Place(), Place()))
            self._shown.append(_Shown(name, known[name], *places))

    @staticmethod
    def _list(known: dict[str, Path]) -> list[dict[str, Any]]:
        return [{"name": name, "active": shelf.is_active(path)} for name, path in known.items()]

    def _changed(self, kind: str, run: str, value: Any) -> list[Event]:
        if self._sent.get((kind, run)) == value:
            return []
        self._sent[kind, run] = value
        return [Event({"run": run, kind: value}, self._id(), kind)]

    def _is_due(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + seconds
        return True

    def _id(self) -> str:
        return ",".join(f"{_mark(each.name)}:{each.metrics}:{each.events}" for each in self._shown)


def _mark(name: str) -> str:
    return f"{zlib.crc32(name.encode('utf-8', 'replace')):x}"


def _places(id: str) -> dict[str, tuple[Place, Place]]:
    """Of each run by its mark, the places in its two files; what is no id of ours has none."""
    found = {}
    for part in id[:4000].split(","):
        mark, *texts = part.split(":")
        if len(texts) == 2:
            found[mark] = Place.from_text(texts[0]), Place.from_text(texts[1])
    return found
