"""member.py NAME ENDPOINT...: a host of a run that only counts steps; a line for each thing.

It leads when nobody does, announces a generation of the hosts that are there, and while it
coordinates it commits a save of every step.
"""

from __future__ import annotations

import json
import sys
import time

from shoal.launch.registry.etcd import Etcd
from shoal.launch.registry.membership import RENEW_SECONDS, Fenced, Membership, View
from shoal.launch.registry.records import Generation, HostFacts, Saved, Slot, Spec
from shoal.launch.registry.store import Unknown, Unreachable

SPEC = Spec(shoal="1", torch="2", code="c", recipe="r", data="d", run="/runs/a")
BETWEEN_SECONDS = 0.2


def say(what: str, **more: object) -> None:
    print(json.dumps({"what": what, "at": time.monotonic(), **more}), flush=True)


class Member:
    def __init__(self, name: str, endpoints: list[str]) -> None:
        store = Etcd(endpoints, prefix="/shoal/lab/", insecure=True, timeout_seconds=1.0)
        facts = HostFacts(host=f"{name}-1", name=name, address=name, port=0, cores=1)
        self.membership, self.enrolled = Membership(store, facts), False
        self.number = self.token = self.renewed = 0
        self.renewed_at = 0.0

    def turn(self) -> None:
        if not self.enrolled:
            self.membership.enrol(SPEC)
            self.enrolled, self.renewed_at = True, time.monotonic()
            say("enrolled")
        if time.monotonic() - self.renewed_at > RENEW_SECONDS:
            self.enrolled = self.membership.keep()
            self.renewed_at = time.monotonic()
            if not self.enrolled:
                say("lease ended")
                return
        view = self.membership.look()
        term = self.membership.lead() if view.coordinator in (None, self.name) else None
        if term is not None:
            self.coordinate(self.membership.look(), term=term)

    @property
    def name(self) -> str:
        return self.membership.host.host

    def coordinate(self, view: View, *, term: int) -> None:
        here = set(view.hosts)
        last = view.generation
        if last is None or last.coordinator != self.name or {s.host for s in last.slots} != here:
            number = (last.number if last else 0) + 1
            slots = tuple(Slot(host=each, worker=0) for each in sorted(here))
            step = view.commit.step if view.commit else 0
            made = Generation(
                number=number, coordinator=self.name, slots=slots, meet="tcp://x:1", base=(0, step)
            )
            self.token = self.membership.announce(made, term=term, after=view.token)
            self.number = number
            say("generation", number=number, hosts=sorted(here))
        step = (view.commit.step if view.commit else 0) + 1
        saved = Saved(generation=self.number, step=step, place=f"step-{step}", manifest="m")
        self.membership.commit(saved, token=self.token)
        say("commit", generation=self.number, step=step)


def main() -> None:
    member = Member(sys.argv[1], sys.argv[2:])
    while True:
        try:
            member.turn()
        except (Unreachable, Unknown) as error:
            say("store away", text=str(error)[:80])
        except Fenced as error:
            say("fenced", text=str(error))
        time.sleep(BETWEEN_SECONDS)


main()
