"""How much a run over many hosts asks of its registry, and of its coordinator: simulated.

    python benchmarks/membership.py [--seconds 10]

The real classes (registry/standby.py, membership.py) turn at their real intervals, against a store
in memory that counts what it is asked, by a clock that is not the machine's. Agents do not ask the
store: they talk to the coordinator, whose cost for one message of theirs is measured, with the real
decoder and the real site.

Two tables: what is asked as it is built (three coordinators stand by, whatever the number of
hosts), and what it would be if every host stood by.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Mapping, Sequence

import msgspec

from shoal.launch import calls
from shoal.launch.agent import SEEN_SECONDS
from shoal.launch.hang import Sighting
from shoal.launch.registry.membership import Membership
from shoal.launch.registry.records import HostFacts, Spec
from shoal.launch.registry.standby import ASK_SECONDS, Candidate
from shoal.launch.registry.store import Compare, Entry, Memory
from shoal.observe.pulse import Beat

SPEC = Spec(shoal="1", torch="2", code="c" * 16, recipe="r" * 24, data="d", run="/runs/a")
STANDING_BY = 3


class Counting(Memory):
    """Counts requests, and the bytes that it answers with."""

    requests = num_bytes = 0

    def read(self) -> dict[str, Entry]:
        self.requests += 1
        found = super().read()
        self.num_bytes += sum(len(key) + len(each.value) for key, each in found.items())
        return found

    def change(
        self,
        put: Mapping[str, bytes],
        *,
        when: Sequence[Compare] = (),
        delete: Sequence[str] = (),
        lease: int | None = None,
    ) -> int | None:
        self.requests += 1
        return super().change(put, when=when, delete=delete, lease=lease)

    def grant(self, seconds: int) -> int:
        self.requests += 1
        return super().grant(seconds)

    def keep(self, lease: int) -> bool:
        self.requests += 1
        return super().keep(lease)


def asked(candidates: int, *, seconds: float) -> tuple[float, float]:
    """Requests a second to the store, and bytes a second from it, once all have enrolled."""
    now = 0.0
    store = Counting(clock=lambda: now)
    every = []
    for number in range(candidates):
        facts = HostFacts(
            host=f"host{number:05d}-{number:08x}",
            name=f"host{number:05d}",
            address=f"10.0.{number >> 8}.{number & 255}",
            port=27465,
            cores=64,
        )
        every.append(
            Candidate(Membership(store, facts), SPEC, say=lambda text: None, clock=lambda: now)
        )
    turns = [(ASK_SECONDS * number / candidates, number) for number in range(candidates)]
    heapq.heapify(turns)
    counted_from: float | None = None
    while turns[0][0] < 1.0 + seconds:
        now, number = heapq.heappop(turns)
        if counted_from is None and now >= 1.0:
            counted_from, store.requests, store.num_bytes = now, 0, 0
        every[number].turn()
        heapq.heappush(turns, (now + ASK_SECONDS, number))
    assert sum(each.term is not None for each in every) == 1, "one leads"
    return store.requests / seconds, store.num_bytes / seconds


def seconds_a_message(*, workers: int) -> float:
    """What the coordinator computes for one sign of an agent with so many workers."""
    beat = Beat(
        beat_at=1e5,
        expected_seconds=0.1,
        step=100,
        collective=3,
        num_bytes=1 << 20,
        generation=3,
        rank=0,
        phase="forward",
        operation="all-reduce",
    )
    sightings = tuple(
        Sighting(rank=n, pid=1000 + n, beat=beat, silent_seconds=0.1, state="", cpu_seconds=1.0)
        for n in range(workers)
    )
    sign = calls.Seen(sightings=sightings, pids={n: 1000 + n for n in range(workers)})
    text, decoder = msgspec.msgpack.encode(sign), msgspec.msgpack.Decoder(calls.ToCoordinator)
    count, began = 2000, time.process_time()
    for _ in range(count):
        decoder.decode(text)
    return (time.process_time() - began) / count


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seconds", type=float, default=10.0)
    seconds = arguments.parse_args().seconds
    cost = seconds_a_message(workers=8)
    requests, num_bytes = asked(STANDING_BY, seconds=seconds)
    print(f"as built: {STANDING_BY} coordinators stand by, 8 workers a host")
    print(
        "| hosts | requests/s to the store | bytes/s from it | signs/s to the coordinator | cores |"
    )
    print("| --- | --- | --- | --- | --- |")
    for hosts in (3, 16, 128, 1024, 16384):
        signs = hosts / SEEN_SECONDS
        print(
            f"| {hosts} | {requests:.1f} | {num_bytes:,.0f} | {signs:,.0f} | {signs * cost:.1%} |"
        )
    print(f"(one sign: {1e6 * cost:.0f} us to decode)\n\nif every host stood by")
    print("| hosts | requests/s to the store | bytes/s from it |")
    print("| --- | --- | --- |")
    for hosts in (3, 16, 128, 512):
        requests, num_bytes = asked(hosts, seconds=min(seconds, 4.0))
        print(f"| {hosts} | {requests:,.0f} | {num_bytes:,.0f} |")
    scale = 16384 / 512
    print(f"| 16384 (from 512) | {requests * scale:,.0f} | {num_bytes * scale**2:,.0f} |")


if __name__ == "__main__":
    main()
