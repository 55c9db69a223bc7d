"""When pushes become updates, and who may go on when: a state machine without tensors or clocks.

A replica's `clock` is the number of its pushes that count; `version` the number of updates (or, in
`Bounded`, of complete clocks). Every event returns the updates it brings about; the same events in
the same order give the same updates, which is what a log of them is good for.

asynchronous   every push is an update at once
bounded        stale-synchronous parallel (Ho et al., NeurIPS 2013): the pushes of one clock become
               one update when every live replica has made it; nobody begins a step whose parameters
               lack more than `staleness` of the clocks before it
quorum         decoupled DiLoCo: a round ends when at least K replicas have pushed and a time of
               grace has passed, or all live ones have; a late push counts in the next round
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Member:
    """A replica as the server knows it."""

    clock: int = 0
    alive: bool = True
    """Expected from the beginning; not while it is being replaced."""
    done: bool = False
    """Nothing follows from it."""


@dataclass(frozen=True)
class Taken:
    """One push: of which replica and clock, with which weight, how stale."""

    replica: int
    clock: int
    weight: float
    staleness: int


@dataclass(frozen=True)
class Update:
    """Pushes that are applied as one, in this order."""

    pushes: tuple[Taken, ...]
    share: float
    """Of a whole update, by which its rate is multiplied: 1, or one of so many replicas."""


class Consistency(ABC):
    """What a server decides. `version`: updates so far."""

    def __init__(self, replicas: int) -> None:
        self.members = {replica: Member() for replica in range(replicas)}
        self.version = 0
        self.pending: list[Taken] = []

    def join(self, replica: int) -> int:
        """A worker speaks for the replica from now on; the clock that it begins with."""
        member = self.members[replica]
        member.alive, member.done = True, False
        self._welcome(member)
        return member.clock

    def leave(self, replica: int) -> list[Update]:
        """The replica's worker is gone."""
        self.members[replica].alive = False
        return self._complete()

    def finish(self, replica: int) -> list[Update]:
        """Nothing follows from the replica."""
        self.members[replica].done = True
        return self._complete()

    def push(self, replica: int, *, weight: float, version: int) -> list[Update]:
        """The push of the replica's present clock, computed from `version`."""
        member = self.members[replica]
        taken = Taken(replica, member.clock, weight, self.staleness(replica, version=version))
        member.clock += 1
        self.pending.append(taken)
        return self._complete()

    def left(self, *, beside: int) -> list[int]:
        """Replicas from which something may follow, but for one; also those being replaced."""
        return [r for r, m in self.members.items() if not m.done and r != beside]

    def kept_clocks(self) -> dict[int, int]:
        """The clocks as they were before the pushes that are not applied yet."""
        waiting = [taken.replica for taken in self.pending]
        return {r: member.clock - waiting.count(r) for r, member in self.members.items()}

    def begin(self, clocks: Mapping[int, int], *, version: int) -> None:
        """Stand where a checkpoint says; replicas that it does not know begin as the others."""
        self.version, self.pending = version, []
        for replica, member in self.members.items():
            member.clock = clocks.get(replica, min(clocks.values(), default=0))

    def state(self) -> dict[str, Any]:
        """Plain data, for `restore`."""
        members = {str(r): [m.clock, m.alive, m.done] for r, m in self.members.items()}
        pending = [[t.replica, t.clock, t.weight, t.staleness] for t in self.pending]
        return {"version": self.version, "members": members, "pending": pending}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` says."""
        self.version = state["version"]
        self.members = {int(r): Member(*values) for r, values in state["members"].items()}
        self.pending = [Taken(*values) for values in state["pending"]]

    @abstractmethod
    def staleness(self, replica: int, *, version: int) -> int:
        """How much is not in `version` that the replica's present clock could have known."""

    @abstractmethod
    def may_begin(self, replica: int) -> bool:
        """Whether the replica may begin the step of its present clock."""

    @abstractmethod
    def waits_for(self, replica: int) -> str:
        """In words, whom a replica that may not begin waits for."""

    @property
    def may_close(self) -> bool:
        """Whether only grace keeps the pending pushes from becoming an update."""
        return False

    def close(self) -> list[Update]:
        """The time of grace is over."""
        return []

    def _welcome(self, member: Member) -> None:
        """What becomes of the clock of a replica whose worker was replaced."""
        return

    @abstractmethod
    def _complete(self) -> list[Update]:
        """The updates that `pending` now is complete for."""


class Asynchronous(Consistency):
    """Every push is an update; its rate is one of so many replicas, so that one push of each moves
    as far as one step over the global batch."""

    def staleness(self, replica: int, *, version: int) -> int:
        return self.version - version

    def may_begin(self, replica: int) -> bool:
        return True

    def waits_for(self, replica: int) -> str:
        return ""

    def _complete(self) -> list[Update]:
        updates = [Update((taken,), 1 / len(self.members)) for taken in self.pending]
        self.version += len(updates)
        self.pending.clear()
        return updates


class Bounded(Consistency):
    """Stale-synchronous parallel with bound `staleness`; 0 is synchronous.

    `version` counts complete clocks. A worker that takes the place of a lost one begins with the
    first clock that is not complete; what its predecessor did not push is left out.
    """

    def __init__(self, replicas: int, *, staleness: int) -> None:
        super().__init__(replicas)
        self.bound = staleness

    def staleness(self, replica: int, *, version: int) -> int:
        return max(0, self.members[replica].clock - version)

    def may_begin(self, replica: int) -> bool:
        return self.members[replica].clock - self.version <= self.bound

    def waits_for(self, replica: int) -> str:
        behind = [r for r, m in self.members.items() if m.alive and m.clock <= self.version]
        return f"step {self.version + 1} of replica {', '.join(map(str, behind))}"

    def begin(self, clocks: Mapping[int, int], *, version: int) -> None:
        super().begin(dict.fromkeys(clocks, version), version=version)

    def _welcome(self, member: Member) -> None:
        member.clock = max(member.clock, self.version)

    def _complete(self) -> list[Update]:
        updates = []
        while ready := sorted(
            (taken for taken in self.pending if taken.clock == self.version),
            key=lambda taken: taken.replica,
        ):
            live = [member for member in self.members.values() if member.alive and not member.done]
            if any(member.clock <= self.version for member in live):
                break
            self.pending = [taken for taken in self.pending if taken.clock != self.version]
            self.version += 1
            updates.append(Update(tuple(ready), 1.0))
        return updates


class Quorum(Consistency):
    """A round takes the pushes of at least `least` replicas, weighted."""

    def __init__(self, replicas: int, *, least: int) -> None:
        super().__init__(replicas)
        self.least = least

    def staleness(self, replica: int, *, version: int) -> int:
        return self.version - version

    def may_begin(self, replica: int) -> bool:
        return all(taken.replica != replica for taken in self.pending)

    def waits_for(self, replica: int) -> str:
        here, least = {taken.replica for taken in self.pending}, self._least()
        return f"round {self.version + 1}, for which {len(here)} of at least {least} replicas came"

    def _least(self) -> int:
        done = sum(member.done for member in self.members.values())
        return max(1, min(self.least, len(self.members) - done))

    @property
    def may_close(self) -> bool:
        return bool(self.pending) and len({t.replica for t in self.pending}) >= self._least()

    def close(self) -> list[Update]:
        if not self.may_close:
            return []
        pushes = tuple(sorted(self.pending, key=lambda taken: (taken.replica, taken.clock)))
        self.pending, self.version = [], self.version + 1
        return [Update(pushes, 1.0)]

    def _complete(self) -> list[Update]:
        here = {taken.replica for taken in self.pending}
        live = {r for r, member in self.members.items() if member.alive and not member.done}
        return self.close() if live <= here else []
