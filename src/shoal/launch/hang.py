"""The hang doctor: who is where, who waits for whom, who is stuck, and what it does just now.

Judges what a site has seen (launch/site.py): pulses, and what the system knows of each process.
Works without the workers' help: a stopped or spinning worker cannot answer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from shoal.observe.pulse import Beat

WAITS = ("waiting for a generation", "waiting for the servers", "fetching a save")
"""Phases in which a worker waits for others, for the supervisor, or for a store of objects."""
MEETING = "meeting the others"
MEETING_SECONDS = 30.0
"""All have arrived when this phase begins: a host that falls silent in it would hold the others."""
LONG = (
    "starting",
    "building the model",
    "agreeing",
    "restore",
    "repair",
    "evaluate",
    "complete",
    "save",
    "finish",
)
"""Phases that may take long without a sign."""
INSIDE = ("forward", "backward", "reduce", "apply")
"""Phases in which workers of one replica exchange parts of tensors."""
FACTOR = 3.0
STARVED = 60.0
"""Times its limit: after that even a worker that is only starved of a processor is given up."""
FIRST_SECONDS = 300.0
"""Patience with a phase that was never timed, such as the first forward."""
LONG_SECONDS = 600.0
STOPPED_SECONDS = 0.4
LOOKS = 3
"""A worker that is late sleeps only if it was seen so as often, one look after another."""
DEADLOCK_SECONDS = 20.0
"""Patience when every worker is inside a collective: a slow network, or a mismatch; and on top of
it what the bytes of the collective take on the links that were measured."""


@dataclass(frozen=True)
class Sighting:
    """One worker, as seen now."""

    rank: int
    pid: int | None
    beat: Beat | None
    silent_seconds: float
    """Without a sign, not counting time in which the site itself was stopped."""
    state: str
    """What the system says: runs, sleeps, is stopped, waits for a device, unknown."""
    cpu_seconds: float | None = None
    """Of all its threads together; of ranks that share a process, its share."""


@dataclass(frozen=True)
class Stuck:
    """A worker that must be replaced, and why."""

    rank: int
    reason: str


class Doctor:
    """Judges sightings. A worker is late when it is silent for too long, and when that is not
    for want of a processor: one that runs must have computed for as long as its limit, too."""

    def __init__(
        self,
        *,
        silence_seconds: float,
        meets_inside: bool = False,
        threads: int = 1,
        bytes_per_second: float | None = None,
    ) -> None:
        """`meets_inside`: workers of one replica also meet inside forward and backward, unseen.
        `threads`: those that compute for one worker. `bytes_per_second`: of the slowest link for
        one worker, where it is known.
        """
        self._floor, self._meets_inside, self._threads = silence_seconds, meets_inside, threads
        self._bytes_per_second, self._most_bytes = bytes_per_second, 0
        self._cpu: dict[int, tuple[float, float]] = {}
        """Rank -> (time of its last beat, CPU seconds it had used when that was first seen)."""
        self._asleep: Counter[int] = Counter()
        """Looks, one after another, at which a rank was seen asleep: one may be by chance."""

    def look(self, seen: list[Sighting]) -> list[Stuck]:
        """The workers that are stuck, if any."""
        found = [
            Stuck(one.rank, "is stopped (SIGSTOP)")
            for one in seen
            if one.state == "is stopped" and one.silent_seconds > STOPPED_SECONDS
        ]
        late = [(one, self._computed(one)) for one in seen]
        found = found or [stuck for one, cpu in late if (stuck := self._late(one, cpu)) is not None]
        return found or self._deadlock(seen)

    def limit(self, beat: Beat | None) -> float | None:
        """How long this beat may be the last; None: as long as it takes."""
        if beat is None:
            return LONG_SECONDS
        if beat.operation or beat.phase in WAITS:
            return None
        if beat.phase == MEETING:
            return max(self._floor, MEETING_SECONDS)
        if beat.phase in LONG:
            usual = FACTOR * beat.expected_seconds
            return max(10.0, usual) if usual else LONG_SECONDS
        if not beat.expected_seconds:
            return max(self._floor, FIRST_SECONDS)
        return max(self._floor, FACTOR * beat.expected_seconds)

    def _computed(self, one: Sighting) -> float | None:
        """CPU seconds of one of its threads since its last beat, if all do the same; or None."""
        if one.cpu_seconds is None:
            return None
        beat_at = one.beat.beat_at if one.beat is not None else 0.0
        known = self._cpu.get(one.rank)
        if known is None or known[0] != beat_at:
            known = self._cpu[one.rank] = (beat_at, one.cpu_seconds)
        return (one.cpu_seconds - known[1]) / self._threads

    def _late(self, one: Sighting, computed: float | None) -> Stuck | None:
        limit = self.limit(one.beat)
        if limit is None or one.silent_seconds <= limit:
            return None
        asleep = one.state not in ("runs", "waits for a device")
        self._asleep[one.rank] = self._asleep[one.rank] + 1 if asleep else 0
        if asleep and one.cpu_seconds is not None and self._asleep[one.rank] < LOOKS:
            return None
        inside = one.beat is not None and one.beat.phase in INSIDE
        if asleep and inside and self._meets_inside and one.silent_seconds <= DEADLOCK_SECONDS:
            return None  # most likely it waits for another, who is the one that is late
        if asleep or computed is None:
            return Stuck(one.rank, f"gives no sign ({one.state})")
        if computed > limit:
            return Stuck(one.rank, "runs without a step (a live-lock)")
        return Stuck(one.rank, "gets no time") if one.silent_seconds > STARVED * limit else None

    def patience(self) -> float:
        """Seconds that all may be inside collectives.

        By the largest that was seen: who sends is through earlier than who gets it, and then
        waits in the next one.
        """
        if self._bytes_per_second is None:
            return DEADLOCK_SECONDS
        return DEADLOCK_SECONDS + FACTOR * self._most_bytes / self._bytes_per_second

    def _deadlock(self, seen: list[Sighting]) -> list[Stuck]:
        """Everybody is inside a collective and nothing moves: those unlike the others are stuck."""
        beats = [(one.rank, one.beat) for one in seen if one.beat is not None]
        self._most_bytes = max([self._most_bytes, *(beat.num_bytes for _, beat in beats)])
        if len(beats) < 2 or len(beats) < len(seen) or not all(b.operation for _, b in beats):
            return []
        if min(one.silent_seconds for one in seen) < self.patience():
            return []
        calls = {rank: (b.collective, b.operation, b.num_bytes) for rank, b in beats}
        usual = Counter(calls.values()).most_common(1)[0][0]
        other = [rank for rank, call in calls.items() if call != usual]
        if not other:
            return [
                Stuck(rank, "waits with all others: the network moves nothing") for rank in calls
            ]
        text = "collective {} is {} of {} bytes"
        wanted = text.format(*usual)
        return [
            Stuck(
                rank, f"does not match the others: its {text.format(*calls[rank])}, theirs {wanted}"
            )
            for rank in other
        ]


def report(seen: list[Sighting]) -> list[str]:
    """The table that a person reads: one line a worker, and who is waited for."""
    lines = []
    for one in seen:
        where = one.beat.where if one.beat is not None else "has not begun"
        since = f"{one.silent_seconds:.1f} s ago"
        lines.append(f"worker {one.rank}: {where}; last sign {since}; the process {one.state}")
    waiting = [one.rank for one in seen if one.beat is not None and one.beat.operation]
    missing = [one.rank for one in seen if one.rank not in waiting]
    if waiting and missing:
        who = " and ".join(map(str, missing))
        lines.append(f"workers {', '.join(map(str, waiting))} wait for worker {who}")
    return lines
