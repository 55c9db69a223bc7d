"""The hosts of a run as its supervisor sees them: which are there, and who works where meanwhile.

A replica belongs to one host, or to several where there are more hosts than replicas. When one has
gone, the others go on without its replicas where the recipe lets the degree shrink that far; else
its ranks start on another host, the least busy one. A host that comes back gets them again, after a
rest that grows with every time it has gone.
Of hosts that do not reach each other the fewest are left out until they do (launch/reach.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from shoal.errors import WorkerError
from shoal.launch.hang import Sighting
from shoal.launch.reach import Reach, fewest_left_out
from shoal.launch.site import Site
from shoal.launch.supervised import SupervisedWorker
from shoal.layout import Layout, host_of_rank

_TOGETHER_SECONDS = 1.0
_REST_SECONDS = 10.0
_LONGEST_REST_SECONDS = 160.0
_SILENT_SECONDS = 3.0
"""Without a sign of any worker: then hosts test whether they reach each other."""
_TEST_AGAIN_SECONDS = 10.0
_TEST_LEFT_OUT_SECONDS = 5.0


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
        self._reach = Reach(sites)
        self._left_out: set[int] = set()
        self._cut_off: list[Site] = []
        self._doubts = False
        self.doubt()

    @property
    def in_doubt(self) -> bool:
        """Whether a generation had better wait until it is known who reaches whom."""
        return self._doubts and self._reach.under_way

    def doubt(self) -> None:
        """Find out who reaches whom before the next generation."""
        self._doubts = True
        self._reach.ask()

    def watch(self, seen: Sequence[Sighting]) -> None:
        """Find it out when nobody has given a sign for a while: who sums over a cut cable waits."""
        silent = min((one.silent_seconds for one in seen), default=0.0)
        again = time.monotonic() - self._reach.asked_at > _TEST_AGAIN_SECONDS
        if silent > _SILENT_SECONDS and again and not self._reach.under_way:
            self.doubt()

    def cut_off(self) -> list[Site]:
        """Those that are left out from now on."""
        found, self._cut_off = self._cut_off, []
        return found

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
        away = {of(r) for r in range(self._layout.workers) if not self._is_there(self.own(r))}
        if self._layout.replicate - len(away) >= self._fewest:
            return None
        busy = [one for one in workers if one.alive and one.site in there]
        beside = (one.site for one in busy if of(one.rank) == of(rank))
        least = min(there, key=lambda site: sum(one.site is site for one in busy))
        return next(beside, least)

    def look(self) -> list[Site]:
        """Say who has gone or is back; the sites that may be used again from now on."""
        ready = []
        if self._reach.look():
            self._weigh()
        late = time.monotonic() - self._reach.asked_at > _TEST_LEFT_OUT_SECONDS
        if self._left_out and late and not self._reach.under_way:
            self._reach.ask()
        for number, site in enumerate(self._sites):
            if site.gone is not None and number not in self._gone:
                self._gone[number] = f"{name_of(site)} {site.gone}"
                self._left_out.discard(number)
                self._times[number] += 1
                self._back_at.pop(number, None)
                text = f"{self._gone[number]}: its workers count as dead"
                self._tell("host-lost", {"host": name_of(site), "text": text})
            elif site.gone is None and number in self._gone:
                del self._gone[number]
                self._drained.discard(number)
                self._leaving.discard(number)
                self._rest(number, f"{name_of(site)} is back")
                self.doubt()
            rests = time.monotonic() < self._back_at.get(number, 0.0) or self.in_doubt
            if number in self._back_at and not rests:
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

    def _weigh(self) -> None:
        """Leave out those that are in the way of the others, and take in those that are no more."""
        self._doubts = False
        there = {n for n, site in enumerate(self._sites) if site.gone is None} - self._drained
        pairs = self._reach.cut(there)
        out = fewest_left_out(pairs, idle={*self._left_out, *self._back_at})
        back, new = self._left_out - out, sorted(out - self._left_out)
        self._left_out = out
        for number in sorted(back & there):
            self._rest(number, f"{name_of(self._sites[number])} reaches all others again")
        if new:
            for number in new:
                self._times[number] += 1
                self._back_at.pop(number, None)
            self._cut_off += [self._sites[number] for number in new]
            names = [name_of(site) for site in self._sites]
            gone = [names[number] for number in new]
            cut = [[names[number] for number in pair] for pair in sorted(pairs)]
            who = "; ".join(" and ".join(pair) for pair in cut)
            text = f"{who} do not reach each other: {', '.join(gone)} left out"
            self._tell("left-out", {"hosts": gone, "pairs": cut, "text": text})

    def _rest(self, number: int, what: str) -> None:
        rest = 0.0
        if self._times[number] > 1:
            rest = min(_REST_SECONDS * 2.0 ** (self._times[number] - 2), _LONGEST_REST_SECONDS)
        self._back_at[number] = time.monotonic() + rest
        after = f", and is used again in {rest:.0f} s" if rest else ""
        self._tell("host-back", {"host": name_of(self._sites[number]), "text": what + after})

    def _is_there(self, site: Site) -> bool:
        number = self._sites.index(site)
        away = self._drained | self._left_out | self._back_at.keys()
        return site.gone is None and number not in away

    def _number(self, rank: int) -> int:
        return host_of_rank(self._layout, rank, num_hosts=len(self._sites))


def _words(site: Site) -> set[str]:
    """What a person may call it: its name, its address, that with the port."""
    words = name_of(site).removeprefix("host ").replace("(", "").replace(")", "").split()
    return {*words, *(word.rpartition(":")[0] for word in words if ":" in word)}


def name_of(site: Site) -> str:
    """What a person knows it by."""
    return f"host {getattr(site, 'name', 'localhost')}"
