"""Which hosts reach one another, asked of their agents; and whom to do without where some do not.

Two hosts may both reach the coordinator and not each other: then no sum over the two ends, and
neither of them closes anything (docs/design/hosts.md). What is tested is a TCP connection, which
takes both directions, so a cable that is cut in one of them is cut. Both ends open one, for a
firewall may let through what one of them opens and not what the other does.
"""

from __future__ import annotations

import heapq
import selectors
import socket
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

from shoal.launch.site import Site

TEST_SECONDS = 3.5
"""Of one test: the kernel sends what opens a connection at 0, 1 and 3 s."""
MOST_ADDRESSES = 64
"""That one host tests at a time."""
_ANSWER_SECONDS = TEST_SECONDS + 2.0
_MOST_WORK = 1_000_000
"""Pairs that the exact search looks at (about a second); beyond it the best that was found counts,
which takes many hosts with cuts at random."""

Pair = tuple[int, int]
"""Numbers of two hosts, the smaller one first."""


def unreached(
    addresses: Sequence[str], *, timeout_seconds: float = TEST_SECONDS
) -> tuple[str, ...]:
    """Those of `addresses` (tcp://HOST:PORT) to which no connection comes about in time."""
    found = list[str]()
    with selectors.DefaultSelector() as selector:
        for address in addresses:
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            host = host.strip("[]")
            made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            made.setblocking(False)
            try:
                made.connect((host, int(port)))
            except BlockingIOError:
                selector.register(made, selectors.EVENT_WRITE, address)
            except (OSError, ValueError, OverflowError):
                made.close()  # it means nothing here, or no way leads there
                found.append(address)
            else:
                made.close()
        left, deadline = timeout_seconds, time.monotonic() + timeout_seconds
        while selector.get_map() and left > 0:
            left = deadline - time.monotonic()
            for key, _ in selector.select(max(0.0, left)):  # once more, if we had no processor
                made = key.fileobj  # type: ignore[assignment]
                selector.unregister(made)
                if made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    found.append(key.data)
                made.close()
        for key in list(selector.get_map().values()):
            found.append(key.data)
            with suppress(OSError):
                key.fileobj.close()  # type: ignore[union-attr]
    return tuple(address for address in addresses if address in found)


class Reach:
    """What the agents of `sites` say of one another. Nothing is asked where there is one site."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._cut: set[tuple[int, int]] = set()
        """(Who could not connect, to whom)."""
        self._asked: dict[int, list[int]] = {}
        """Of the round under way: whom each host tests."""
        self._began_at = 0.0
        self._distance = self._number = 0
        self._again = False
        self.under_way = False
        self.asked_at = float("-inf")

    def ask(self) -> None:
        """Begin a test of all pairs; after the one under way, where there is one."""
        if len(self._sites) < 2:
            return
        self._again = self.under_way
        if not self.under_way:
            self.under_way, self._distance, self.asked_at = True, 1, time.monotonic()
            self._begin()

    def look(self) -> bool:
        """Whether a test has come to its end just now."""
        if not self.under_way:
            return False
        late = time.monotonic() - self._began_at > _ANSWER_SECONDS
        if not late and any(self._waits_for(number) for number in self._asked):
            return False
        for number, others in self._asked.items():
            unreached = self._sites[number].unreached(self._number)
            if unreached is not None:
                self._cut -= {(number, other) for other in others}
                away = [other for other in others if self._sites[other].open_address in unreached]
                self._cut |= {(number, other) for other in away}
        if self._distance < len(self._sites):
            self._begin()
            return False
        self.under_way = False
        if self._again:
            self.ask()
        return not self.under_way

    def cut(self, there: Collection[int]) -> set[Pair]:
        """Pairs of the hosts `there` that do not reach each other, as far as is known."""
        found = (pair for pair in self._cut if pair[0] in there and pair[1] in there)
        return {(min(pair), max(pair)) for pair in found}

    def _waits_for(self, number: int) -> bool:
        site = self._sites[number]
        return site.gone is None and site.unreached(self._number) is None

    def _begin(self) -> None:
        """The next round: each host tests those that follow it at some distances in the ring."""
        count = len(self._sites)
        end = min(self._distance + MOST_ADDRESSES, count)
        there = [number for number, site in enumerate(self._sites) if site.gone is None]
        self._number, self._asked = self._number + 1, {}
        for number in there:
            others = {(number + d) % count for d in range(self._distance, end)}
            self._asked[number] = sorted(others & set(there))
            addresses = [self._sites[other].open_address for other in self._asked[number]]
            self._sites[number].test_reach(self._number, addresses)
        self._distance, self._began_at = end, time.monotonic()


def fewest_left_out(pairs: Iterable[Pair], *, idle: Collection[int] = ()) -> set[int]:
    """The hosts to do without, so that no pair of `pairs` is left: as few as can be.

    Of several such choices the one with fewest that are at work (not `idle`); then the one that
    keeps the first host, then the second, and so on. So it is a minimum vertex cover, found part by
    part; of many hosts with cuts at random (`_MOST_WORK`) perhaps not the smallest.
    """
    beside: defaultdict[int, set[int]] = defaultdict(set)
    for one, other in pairs:
        beside[one].add(other)
        beside[other].add(one)
    chosen: set[int] = set()
    for part in _parts(beside):
        chosen |= _cover({number: beside[number] for number in part}, idle=idle)
    return chosen


def _parts(beside: dict[int, set[int]]) -> list[set[int]]:
    """Hosts that are joined by pairs, over others if need be."""
    found, left = [], set(beside)
    while left:
        part, new = set[int](), {min(left)}
        while new:
            part |= new
            new = {other for number in new for other in beside[number]} - part
        found.append(part)
        left -= part
    return found


def _cover(beside: dict[int, set[int]], *, idle: Collection[int]) -> set[int]:
    """The best cover of one part. The host with most pairs goes, or all that it does not reach."""

    def cost(cover: set[int]) -> tuple[int, int, list[int]]:
        return len(cover), len(cover - set(idle)), [-number for number in sorted(cover)]

    best, work = _greedy(beside), 0
    stack = [(beside, set[int]())]
    while stack and work < _MOST_WORK:
        left, cover = stack.pop()
        left = {number: others for number, others in left.items() if others}
        work += 1 + sum(map(len, left.values()))
        if len(cover) + bool(left) > len(best):
            continue
        if not left:
            best = min(best, cover, key=cost)
            continue
        number = min(left, key=lambda each: (-len(left[each]), each))
        for gone in (left[number], {number}):
            rest = {each: left[each] - gone for each in left if each not in gone}
            stack.append((rest, cover | gone))
    return best


def _greedy(beside: dict[int, set[int]]) -> set[int]:
    """A cover: again and again the host with most pairs that are left."""
    left = {number: set(others) for number, others in beside.items()}
    heap = [(-len(others), number) for number, others in left.items()]
    heapq.heapify(heap)
    cover = set[int]()
    while heap:
        count, number = heapq.heappop(heap)
        if number in cover or not left[number]:
            continue
        if -count != len(left[number]):
            heapq.heappush(heap, (-len(left[number]), number))
            continue
        cover.add(number)
        for other in left.pop(number):
            left[other].discard(number)
    return cover
