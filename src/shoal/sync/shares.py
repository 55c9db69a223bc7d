"""How much of every batch each replica computes: the same, or as much as it is quick.

Which samples a step reads depends on seed and step alone; shares only say who computes which of
them, in whole micro batches. All ranks come to the same shares at the same step, from times that
they have exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from shoal.layout import Share, split_evenly

EVERY_STEPS = 10
"""Least number of steps from one exchange of times to the next."""
_CYCLE = 16
"""Steps after which replicas that step alone have had exactly what is due to them."""
_WORTH = 0.9
"""Shares change where the slowest replica would need less than this part of its time."""


@dataclass(frozen=True)
class Division:
    """How a global batch is divided between replicas: in whole micro batches of all shards."""

    global_batch_samples: int
    micro_batch_samples: int
    shards: int = 1
    least: int = 1
    """Micro batches that a replica needs at least in a step, and a multiple of what it takes: as a
    pipeline's schedule says."""
    multiple: int = 1

    def share(self, rank: int, size: int) -> Share:
        """The equal part of replica `rank` of `size`."""
        multiple = self.micro_batch_samples * self.shards
        return split_evenly(self.global_batch_samples, size, rank, multiple=multiple)

    @property
    def units(self) -> int:
        """Micro batches of a step, each of all shards."""
        return self.global_batch_samples // (self.micro_batch_samples * self.shards)


def allocate(count: int, times: Sequence[int], *, least: int = 1) -> list[int]:
    """`count` things to do, of which replica r takes times[r] for each, at least `least` for each.

    The one who would end first gets the next, so that the last one ends as early as can be.
    """
    given = [least] * len(times)
    for _ in range(count - sum(given)):
        first = min(range(len(times)), key=lambda r: ((given[r] + 1) * times[r], r))
        given[first] += 1
    return given


class Shares:
    """Those of one generation. `measured`: by speed; else equal.

    Replicas that step together divide each step's micro batches. Replicas that step alone keep
    their batch, and take fewer or more: the slow one sits out steps, which others compute for it.
    """

    def __init__(self, division: Division, *, measured: bool = False) -> None:
        self._division, self.measured = division, measured
        self._size = 1
        self._agreed: list[int] = []
        """Nanoseconds of a micro batch on each replica, as all know; empty: equal."""
        self._before, self._since = list[int](), 0
        """What holds for the steps before `_since`: up to the one in which all agreed."""
        self._asked_at: int | None = None
        self._seen: list[float] = []
        """Seconds of a micro batch on this rank, step by step since the last agreement."""
        self._notes: list[tuple[str, dict[str, Any]]] = []
        self._fraction = 1.0

    def enter(self, size: int) -> None:
        """Stand among `size` replicas; what other replicas were worth says nothing of these."""
        self._size, self._seen, self._asked_at = size, [], None
        if len(self._agreed) != size:
            self._agreed = []

    def share(self, replica: int, step: int, *, alone: bool = False) -> Share:
        """What a replica computes of the batch of `step`; `alone`: replicas step by themselves."""
        times = self._agreed if step >= self._since else self._before
        if not times:
            return self._division.share(replica, self._size)
        units = self._turn(times, step) if alone else self._by_step(times)
        samples = self._division.micro_batch_samples * self._division.shards
        start = sum(units[:replica])
        return Share(start * samples, (start + units[replica]) * samples)

    def own(self, replica: int, step: int, *, alone: bool = False) -> Share:
        """The share of this rank's replica, which `figures` tells of."""
        share = self.share(replica, step, alone=alone)
        self._fraction = len(share) / self._division.global_batch_samples
        return share

    @property
    def is_idle(self) -> bool:
        """Whether this replica sits out the step under way."""
        return self._fraction == 0

    def _by_step(self, times: Sequence[int]) -> list[int]:
        """Micro batches of each replica in a step that all take together."""
        division, multiple = self._division, self._division.multiple
        least = -(-division.least // multiple)
        count = division.units // multiple
        if count < least * len(times):
            return self._equal()
        return [multiple * each for each in allocate(count, times, least=least)]

    def _equal(self) -> list[int]:
        samples = self._division.micro_batch_samples * self._division.shards
        each = (self._division.share(replica, self._size) for replica in range(self._size))
        return [len(share) // samples for share in each]

    def _turn(self, times: Sequence[int], step: int) -> list[int]:
        """Micro batches of each replica in a step that each takes by itself: whole equal parts.

        A smooth weighted round robin: who is owed most gets the next part.
        """
        parts, size = self._equal(), self._size
        weights = allocate(_CYCLE * size, times)
        owed = [0] * size
        units = [0] * size
        for _ in range(step % _CYCLE + 1):
            units = [0] * size
            for part in parts:
                owed = [have + weight for have, weight in zip(owed, weights)]
                first = max(range(size), key=lambda r: (owed[r], -r))
                owed[first] -= _CYCLE * size
                units[first] += part
        return units

    # --- agreement

    def note(self, seconds: float, *, micro_batches: int) -> None:
        """This rank has computed so many micro batches of a step."""
        if self.measured and micro_batches:
            self._seen.append(seconds / micro_batches)

    def told(self, step: int) -> int | None:
        """What this rank tells the others: nanoseconds of a micro batch, 0 if it has computed none.

        None: nothing is exchanged now. The same on all ranks, which ask at the same steps.
        """
        if not self.measured or self._size == 1:
            return None
        if self._asked_at is None or step - self._asked_at < EVERY_STEPS:
            self._asked_at = step if self._asked_at is None else self._asked_at
            return None
        self._asked_at = step
        seen, self._seen = self._seen, []
        return max(1, round(1e9 * median(seen))) if seen else 0

    def agree(self, times: Sequence[int], *, step: int, alone: bool = False) -> None:
        """Take the times of all ranks, a block of them for each replica; the same on all.

        Shares of steps after `step` (from 0) may change by it.
        """
        each = len(times) // self._size
        slowest = [max(times[r * each : (r + 1) * each]) for r in range(self._size)]
        known = self._agreed or [0] * self._size
        found = [time or before for time, before in zip(slowest, known)]
        if not all(found):
            return
        divide = (lambda t: allocate(_CYCLE * self._size, t)) if alone else self._by_step
        now = divide(self._agreed) if self._agreed else [1] * self._size
        scale = (_CYCLE * self._size if alone else self._division.units) / sum(now)
        then = divide(found)
        last = max(count * time for count, time in zip(then, found))
        if last >= _WORTH * max(count * scale * time for count, time in zip(now, found)):
            return
        self._before, self._agreed, self._since = self._agreed, found, step + 1
        parts = [count / sum(then) for count in then]
        seconds = ", ".join(f"{time / 1e9:.3g}" for time in found)
        text = (
            f"micro batches take {seconds} s on replicas 0 to {self._size - 1}: from now on they "
        )
        text += f"compute {', '.join(f'{part:.1%}' for part in parts)} of every batch"
        self._notes.append(("shares", {"shares": parts, "nanoseconds": found, "text": text}))

    # --- state

    def notes(self) -> list[tuple[str, dict[str, Any]]]:
        """Changes since the last call, to be told as events."""
        found, self._notes = self._notes, []
        return found

    def figures(self) -> dict[str, float]:
        """For the row of a step: what part of its batch this replica has computed."""
        return {"share": self._fraction} if self.measured else {}

    def facts(self) -> dict[str, Any]:
        """JSON-able; the same on all ranks."""
        return {"nanoseconds": list(self._agreed)}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Stand where `facts` say, if they are of as many replicas."""
        agreed = [int(each) for each in facts.get("nanoseconds", ())]
        self._agreed = agreed if self.measured and len(agreed) == self._size else []
        self._before, self._since, self._seen, self._notes = [], 0, [], []
