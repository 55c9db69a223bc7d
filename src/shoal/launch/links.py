"""How fast hosts reach one another: a ring of messages at the join, and who answers them.

First every host times single bytes to the next one, while nothing else is sent: else they would
wait behind what comes the other way. Then all fill the way to the next one at the same time, as
sums do; then the way to themselves. What is counted is what the other end says it has received, so
what waits in buffers is not taken for speed. A test is bounded in seconds and bytes. Nothing that
arrives is kept or looked at.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import msgspec

from shoal.config.link import Link as SlowLink
from shoal.engine.job import Job
from shoal.layout import workers_of_hosts
from shoal.plan.over_hosts import Link

MOST_SECONDS = 1.0
MOST_BYTES = 32 << 20
"""Of one test between two hosts, whichever comes first."""
PINGS = 5
_LONGEST_SECONDS = 8.0
"""That one connection is answered."""
_MOST_ANSWERED = 256
"""Connections at a time; the oldest goes first."""
_PIECE = 1 << 17
_TOTAL = struct.Struct("<Q")


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A link in one direction. A rate of 0: nothing came through in time."""

    bytes_per_second: float
    round_trip_seconds: float


def measure(
    address: str,
    *,
    sends: bool = True,
    most_seconds: float = MOST_SECONDS,
    most_bytes: int = MOST_BYTES,
) -> Measured:
    """The way to an `Answering` at `address` (tcp://HOST:PORT).

    Without `sends` only the round trip is measured.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    nothing = Measured(0.0, 0.0)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=most_seconds) as made:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            times = []
            for _ in range(PINGS):
                began = time.monotonic()
                made.sendall(b".")
                if not _totals(made):
                    return nothing
                times.append(time.monotonic() - began)
            if not sends:
                return Measured(0.0, median(times))
            rate = _rate(made, most_seconds=most_seconds, most_bytes=most_bytes)
            # what is still in buffers goes no further
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return Measured(rate, median(times))
    except (OSError, ValueError, OverflowError):
        return nothing


def _totals(made: socket.socket) -> list[int]:
    """What the other end has received so far, as it says; empty once it has gone."""
    text = made.recv(1 << 16)
    while len(text) % _TOTAL.size:
        more = made.recv(_TOTAL.size - len(text) % _TOTAL.size)
        if not more:
            return []
        text += more
    return [total for (total,) in _TOTAL.iter_unpack(text)]


def _rate(made: socket.socket, *, most_seconds: float, most_bytes: int) -> float:
    """Bytes per second over the second half of the time: a start is slow, or lives on credit."""
    piece, sent, seen = bytes(_PIECE), 0, list[tuple[float, int]]()
    began = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(made, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while time.monotonic() - began < most_seconds:
            if seen and seen[-1][1] >= most_bytes + PINGS:
                break
            for _, ready in selector.select(0.05):
                if ready & selectors.EVENT_READ:
                    totals = _totals(made)
                    if not totals:
                        return 0.0
                    seen.append((time.monotonic(), totals[-1]))
                if ready & selectors.EVENT_WRITE:
                    sent += made.send(piece, socket.MSG_DONTWAIT)
                    if sent >= most_bytes:
                        selector.modify(made, selectors.EVENT_READ)
    if len(seen) < 2:
        return 0.0
    middle = (began + seen[-1][0]) / 2
    at, total = max((each for each in seen[:-1] if each[0] <= middle), default=(began, 0))
    return (seen[-1][1] - total) / max(1e-6, seen[-1][0] - at)


@dataclass(eq=False)
class _Caller:
    made: socket.socket
    until: float
    total: int = 0


class Answering:
    """Answers `measure` and `unreached` of other hosts, at a port as workers get theirs.

    An agent's own port would say nothing of a firewall that lets only that one through. Whoever
    calls is told how many bytes have come of it, for some seconds, and nothing else.
    """

    def __init__(self, address: str) -> None:
        """Raises OSError where it cannot listen."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._callers: dict[socket.socket, _Caller] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._ended.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        for made in [self._listener, *self._callers]:
            made.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._ended.is_set():
            for key, _ in self._selector.select(0.2 if self._callers else None):
                made = key.fileobj
                if made is self._listener:
                    self._accept()
                else:
                    self._answer(self._callers[made])  # type: ignore[index]
            now = time.monotonic()
            for caller in [each for each in self._callers.values() if each.until < now]:
                self._let_go(caller)

    def _accept(self) -> None:
        with suppress(OSError):  # it has gone already
            made, _ = self._listener.accept()
            made.setblocking(False)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._callers[made] = _Caller(made, time.monotonic() + _LONGEST_SECONDS)
            self._selector.register(made, selectors.EVENT_READ)
            if len(self._callers) > _MOST_ANSWERED:
                self._let_go(next(iter(self._callers.values())))

    def _answer(self, caller: _Caller) -> None:
        try:
            count = len(caller.made.recv(_PIECE))
            caller.total += count
            if count:
                caller.made.send(_TOTAL.pack(caller.total))
                return
        except BlockingIOError:
            return  # it does not listen to what it is told, which is its own loss
        except OSError:
            pass
        self._let_go(caller)

    def _let_go(self, caller: _Caller) -> None:
        self._selector.unregister(caller.made)
        del self._callers[caller.made]
        caller.made.close()


@dataclass(frozen=True)
class Links:
    """The links of a run, as its plan reckons with them: the slowest of each kind."""

    inside: Link
    between: Link
    ring: tuple[Measured, ...] = field(default=())
    """From each host to the next one, the last to the first."""

    @classmethod
    def of(
        cls, pings: Sequence[Measured], rates: Sequence[Measured], inside: Sequence[Measured]
    ) -> Links | None:
        """None where a test has brought nothing. `pings`, `rates`: each host's to the next one."""
        if not rates or not len(pings) == len(rates) == len(inside):
            return None
        if not all(each.bytes_per_second for each in (*rates, *inside)):
            return None
        pairs = zip(rates, pings, strict=True)
        ring = [Measured(a.bytes_per_second, b.round_trip_seconds) for a, b in pairs]
        return cls(_slowest(inside), _slowest(ring), tuple(ring))

    def to_json(self) -> dict[str, Any]:
        """What plan.json keeps: bytes per second, seconds one way, and each measurement."""
        ring = [msgspec.structs.asdict(each) for each in self.ring]
        return {"between": asdict(self.between), "inside": asdict(self.inside), "ring": ring}


def worker_rate(job: Job, *, num_hosts: int) -> float | None:
    """Bytes per second that a worker can send to others; None: it is not known."""
    if job.recipe.launch.link is not None:  # one host, which plays several
        return SlowLink.parse(job.recipe.launch.link).bytes_per_second
    links = job.decision.measured.get("links")
    if links is None or num_hosts < 2:
        return None
    each = workers_of_hosts(job.decision.layout, num_hosts=num_hosts)
    return float(links["between"]["bytes_per_second"]) / max(each)


def _slowest(links: Sequence[Measured]) -> Link:
    rate = min(each.bytes_per_second for each in links)
    return Link(rate, max(each.round_trip_seconds for each in links) / 2)
