"""The hosts of a run as its supervisor sees them: which are there, and who works where meanwhile.

A replica belongs to one host. When that has gone, the others go on without its replicas where the
recipe lets the degree shrink that far; else these start on another host, the least busy one. A host
that comes back gets its replicas again, after a rest that grows with every time it has gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from shoal.errors import WorkerError
from shoal.launch.cluster import host_of_rank
from shoal.launch.site import Site
from shoal.launch.supervised import SupervisedWorker
from shoal.layout import Layout

_TOGETHER_SECONDS = 1.0
_REST_SECONDS = 10.0
_LONGEST_REST_SECONDS = 160.0


class Hosts:
    """`fewest`: replicas without which nobody goes on."""

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        layout: Layout,
        fewest: int,
        tell: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._sites, self._layout, self._fewest, self._tell = sites, layout, fewest, tell
        self._gone: dict[int, str] = {}
        self._times = [0] * len(sites)
        self._back_at: dict[int, float] = {}
        self._leaving: set[int] = set()
        """Those that a person wants to do without."""
        self._drained: set[int] = set()
        self._asked_at: float | None = None

    def own(self, rank: int) -> Site:
        """The site that a rank's replica belongs to."""
        return self._sites[self._number(rank)]

    def place(self, rank: int, *, workers: Iterable[SupervisedWorker]) -> Site | None:
        """Where a worker for `rank` starts; None: it waits until its host is back.

        Raises WorkerError when no host is left.
        """
        own = self.own(rank)
        if self._is_there(own):
            return own
        there = [site for site in self._sites if self._is_there(site)]
        if not there:
            gone = "; ".join(f"{name_of(site)} {site.gone}" for site in self._sites)
            raise WorkerError(f"no host of the run is left: {gone}")
        of = self._layout.replica_of
        ours = {of(r) for r in range(self._layout.workers) if self._is_there(self.own(r))}
        if len(ours) >= self._fewest:
            return None
        busy = [one for one in workers if one.alive and one.site in there]
        beside = (one.site for one in busy if of(one.rank) == of(rank))
        least = min(there, key=lambda site: sum(one.site is site for one in busy))
        return next(beside, least)

    def look(self) -> list[Site]:
        """Say who has gone or is back; the sites that may be used again from now on."""
        ready = []
        for number, site in enumerate(self._sites):
            if site.gone is not None and number not in self._gone:
                self._gone[number] = f"{name_of(site)} {site.gone}"
                self._times[number] += 1
                self._back_at.pop(number, None)
                text = f"{self._gone[number]}: its workers count as dead"
                self._tell("host-lost", {"host": name_of(site), "text": text})
            elif site.gone is None and number in self._gone:
                self._wait(number, site)
            if number in self._back_at and time.monotonic() >= self._back_at[number]:
                del self._back_at[number]
                ready.append(site)
        return ready

    def drain(self, name: str) -> None:
        """Do without a host from now on, by its name or address."""
        found = [n for n, site in enumerate(self._sites) if name in _words(site)]
        if not found:
            known = ", ".join(name_of(site) for site in self._sites)
            self._tell("drain", {"text": f"asked to do without {name}, but there is only {known}"})
        self._leaving.update(found)

    def leaving(self) -> tuple[list[Site], bool]:
        """Hosts to do without from now on, and whether none would be left."""
        asked = {n for n, site in enumerate(self._sites) if site.leaving} | self._leaving
        new = asked - self._drained
        if not new:
            self._asked_at = None
            return [], False
        self._asked_at = self._asked_at or time.monotonic()
        left = [n for n, site in enumerate(self._sites) if site.gone is None and n not in asked]
        if left and time.monotonic() - self._asked_at < _TOGETHER_SECONDS:
            return [], False  # a scheduler that ends a job tells all hosts, one after the other
        self._drained |= new
        for number in sorted(new):
            text = f"{name_of(self._sites[number])} is about to go, and is done without"
            self._tell("drain", {"host": name_of(self._sites[number]), "text": text})
        return [self._sites[number] for number in sorted(new)], not left

    def _wait(self, number: int, site: Site) -> None:
        del self._gone[number]
        self._drained.discard(number)
        self._leaving.discard(number)
        rest = 0.0
        if self._times[number] > 1:
            rest = min(_REST_SECONDS * 2.0 ** (self._times[number] - 2), _LONGEST_REST_SECONDS)
        self._back_at[number] = time.monotonic() + rest
        after = f", and is used again in {rest:.0f} s" if rest else ""
        self._tell("host-back", {"host": name_of(site), "text": f"{name_of(site)} is back{after}"})

    def _is_there(self, site: Site) -> bool:
        number = self._sites.index(site)
        return site.gone is None and number not in self._back_at and number not in self._drained

    def _number(self, rank: int) -> int:
        return host_of_rank(self._layout, rank, num_hosts=len(self._sites))


def _words(site: Site) -> set[str]:
    """What a person may call it: its name, its address, that with the port."""
    words = name_of(site).removeprefix("host ").replace("(", "").replace(")", "").split()
    return {*words, *(word.rpartition(":")[0] for word in words if ":" in word)}


def name_of(site: Site) -> str:
    """What a person knows it by."""
    return f"host {getattr(site, 'name', 'localhost')}"
