"""Histories of a parameter server: delays, deaths and joins in any order keep what it promises.

The workers of the model below are drawn by hypothesis; the state machine is the server's own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.sync.server.consistency import Asynchronous, Bounded, Consistency, Quorum, Update

EVENTS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["go", "go", "go", "go", "die", "join", "grace"])),
    min_size=20,
    max_size=120,
)


@dataclass
class History:
    """Replicas that pull, compute for any time, push, die and are replaced, as `events` say."""

    machine: Consistency
    computing: dict[int, int] = field(default_factory=dict)
    """Replica -> the version that it computes at."""
    dead: set[int] = field(default_factory=set)
    updates: list[Update] = field(default_factory=list)
    acknowledged: list[tuple[int, int]] = field(default_factory=list)
    observed: list[int] = field(default_factory=list)
    """For every push: how much of what it had to know it did not."""

    def happen(self, replica: int, what: str) -> None:
        machine = self.machine
        if replica not in machine.members:
            return
        if what == "die" and replica not in self.dead:
            self.dead.add(replica)
            self.computing.pop(replica, None)
            self.updates += machine.leave(replica)
        elif what == "join" and replica in self.dead:
            self.dead.discard(replica)
            machine.join(replica)
        elif what == "grace":
            self.updates += machine.close()
        elif what == "go" and replica not in self.dead:
            if replica in self.computing:
                self._push(replica)
            elif machine.may_begin(replica):
                self.computing[replica] = machine.version

    def _push(self, replica: int) -> None:
        machine, version = self.machine, self.computing.pop(replica)
        clock = machine.members[replica].clock
        self.acknowledged.append((replica, clock))
        self.observed.append(clock - version)
        self.updates += machine.push(replica, weight=1.0, version=version)

    @property
    def applied(self) -> Counter[tuple[int, int]]:
        return Counter((t.replica, t.clock) for update in self.updates for t in update.pushes)

    def everybody_goes_on(self) -> None:
        """Nobody dies any more: whoever can go goes."""
        for replica in list(self.dead):
            self.happen(replica, "join")
        for _ in range(200):
            for replica in self.machine.members:
                self.happen(replica, "go")
            self.happen(0, "grace")


@settings(max_examples=200)
@given(events=EVENTS, replicas=st.integers(1, 4), bound=st.integers(0, 3))
def test_staleness_never_exceeds_the_bound(
    events: list[tuple[int, str]], replicas: int, bound: int
) -> None:
    """The bound is over the live members: a dead one, or one that joins, pins nobody."""
    history = History(Bounded(replicas, staleness=bound))
    for event in events:
        history.happen(*event)
        machine = history.machine
        live = [m.clock for r, m in machine.members.items() if r not in history.dead]
        assert not live or max(live) - min(live) <= bound + 1
    assert all(stale <= bound for stale in history.observed)
    assert all(t.staleness <= bound for update in history.updates for t in update.pushes)
    assert set(history.applied.values()) <= {1}, "a push counts once"
    before = machine.version if events else 0
    history.everybody_goes_on()
    assert history.machine.version >= before + 100, "nobody is waited for for ever"


@settings(max_examples=200)
@given(events=EVENTS, replicas=st.integers(1, 4), data=st.data())
def test_a_round_has_its_quorum_and_every_push_one_round(
    events: list[tuple[int, str]], replicas: int, data: st.DataObject
) -> None:
    least = data.draw(st.integers(1, replicas))
    history = History(Quorum(replicas, least=least))
    for event in events:
        history.happen(*event)
    for update in history.updates:
        assert len({taken.replica for taken in update.pushes}) >= least
    pending = {(t.replica, t.clock) for t in history.machine.pending}
    assert set(history.applied) | pending == set(history.acknowledged)
    assert set(history.applied.values()) <= {1} and not set(history.applied) & pending


@settings(max_examples=100)
@given(events=EVENTS, replicas=st.integers(1, 4))
def test_asynchronous_pushes_count_at_once_and_once(
    events: list[tuple[int, str]], replicas: int
) -> None:
    history = History(Asynchronous(replicas))
    for event in events:
        history.happen(*event)
    assert list(history.applied) == history.acknowledged
    assert history.machine.version == len(history.acknowledged)


@settings(max_examples=100)
@given(
    events=EVENTS, kind=st.sampled_from(["asynchronous", "bounded", "quorum"]), cut=st.floats(0, 1)
)
def test_a_machine_that_was_restored_goes_on_alike(
    events: list[tuple[int, str]], kind: str, cut: float
) -> None:
    def new() -> Consistency:
        if kind == "asynchronous":
            return Asynchronous(3)
        return Bounded(3, staleness=2) if kind == "bounded" else Quorum(3, least=2)

    straight, history = History(new()), History(new())
    at = int(cut * len(events))
    for number, event in enumerate(events):
        if number == at:
            again = new()
            again.restore(history.machine.state())
            history.machine = again
        straight.happen(*event)
        history.happen(*event)
    assert history.updates == straight.updates
    assert history.machine.state() == straight.machine.state()
