"""Chooses how a CPU's cores are used by timing the few ways there are, on the recipe itself.

Nothing is modelled. Workers of every setup build the recipe's training at once and then compute in
turns, so that a slower moment of the machine hits all: every candidate one turn, the better half
two more, and so on; then the micro batches of the best. A turn is a step over a part of the global
batch; its passes count as often as the part goes into the whole.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision, WorkerSetup
from shoal.engine.job import Inputs, Job
from shoal.launch.candidates import (
    CLOSE,
    ENOUGH_TURNS,
    Timed,
    best_micro_batch,
    best_of,
    in_one_moment,
    micro_batches_of,
)
from shoal.launch.measuring import wait_for_imports
from shoal.launch.pool import Worker, WorkerPool
from shoal.layout import Layout
from shoal.observe.console import Console

TUNE_SECONDS = 7.0
"""What all of it may take, once the workers' imports are done; 8 s with their start and end."""

_TARGET = "shoal.engine.timing:run"
_TURN_SECONDS = 0.25  # shorter turns take several steps
_LONGEST_SECONDS = 0.5  # of the passes of a turn: what decides the micro batch to begin with
_SUSPICIOUS = 1.3  # times what a smaller micro batch lets expect: timed once more
_MICRO_TOKENS = 1024  # of the micro batch to begin with
_MOST_TURNS = 7
_FIRST_ROUND = 0.5  # of the time that is left
_SETUPS_SHARE = 0.5  # of the time that is left; the rest is for micro batches
_CHEAP = 4  # turns of each that fit into the first round: one core may have two micro batches' work
_BUILD_SHARES = (0.5, 0.75)  # of the time, for building; what takes longer is left out


class _OutOfTime(Exception):
    """The time is over; what is known by then decides."""


@dataclass
class _WorkerSet:
    """The workers of one kind and number."""

    workers: list[Worker]
    built: bool = False
    answer: dict[str, Any] | None = None
    lost: bool = False


class Tuner:
    """Times the candidates of one recipe on this machine."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        inputs: Inputs,
        decision: Decision,
        pool: WorkerPool,
        console: Console,
        row_tokens: int,
        seconds: float | None = None,
    ) -> None:
        """`decision`: what the setups have in common, such as the number format.

        `row_tokens`: of a sample, at most.
        """
        self._recipe, self._inputs, self._decision = recipe, inputs, decision
        self._row_tokens = row_tokens
        self._pool, self._console = pool, console
        self._limit = TUNE_SECONDS if seconds is None else seconds
        self._sets: dict[tuple[str, int], _WorkerSet] = {}
        self._costs: dict[tuple[WorkerSetup, int, int, int], float] = {}
        self._deadline = math.inf
        self._wakes = False
        """Whether a step that is not measured comes before each turn."""
        self.errors: list[str] = []
        """What timing workers ended with."""
        self.seconds = 0.0
        """What it took."""

    def run(self, setups: Sequence[WorkerSetup]) -> list[Timed]:
        """Every candidate that was timed; empty where none could be within the time."""
        wait_for_imports(self._pool, console=self._console)
        began = time.monotonic()
        self._deadline = began + self._limit
        rows: list[Timed] = []
        with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
            try:
                self._start(setups, folder=folder)
                self._time(setups, rows)
            except _OutOfTime:
                pass
            finally:
                self._pool.kill([w for each in self._sets.values() for w in each.workers])
        self.seconds = time.monotonic() - began
        return [row for row in rows if row.steps]

    def _start(self, setups: Sequence[WorkerSetup], *, folder: str) -> None:
        """Start the workers of every setup, and wait until each has built its training."""
        self._console.phase(f"timing {len(setups)} setups (at most {self._limit:.0f} s): building")
        for setup in setups:
            key = _key(setup)
            if key in self._sets:
                continue
            decision = replace(
                self._decision,
                layout=Layout(replicate=setup.count),
                workers=setup.workers,
                threads_per_worker=setup.threads,
                micro_batch_samples=self._micro_batches(setup)[0],
            )
            job = Job(self._recipe, Path(folder), self._inputs, decision).to_json()
            size = 1 if setup.workers == "threads" else setup.count
            self._sets[key] = _WorkerSet(
                [self._pool.start(_TARGET, {**job, "rank": rank}) for rank in range(size)]
            )
        every = list(self._sets.values())
        for share in _BUILD_SHARES:  # the second only where the first was too short for two
            until = self._deadline - (1 - share) * self._limit
            self._hear(lambda: all(each.built or each.lost for each in every), until=until)
            if sum(each.built for each in every) > 1:
                break
        for each in every:
            each.lost |= not each.built
        self._pool.kill([w for each in every if each.lost for w in each.workers])

    def _time(self, setups: Sequence[WorkerSetup], rows: list[Timed]) -> None:
        """Warm up, time the setups, then the micro batches of the best."""
        least = self._micro_batches(setups[0])[0]
        self._warm_up(setups, micro=least)
        able = [setup for setup in setups if not self._sets[_key(setup)].lost]
        if not able:
            return
        first = able[0]
        micro, turn = self._first_micro_batch(first)
        left = self._deadline - time.monotonic()
        affordable = int(_FIRST_ROUND * left / max(len(able) * turn, 1e-4))  # such turns of each
        # workers that have slept share a core when they wake, until the system spreads them
        self._wakes = affordable > 1
        # exchanges happen once a step: the smaller its part, the more they seem to weigh
        parts = self._recipe.train.global_batch_samples // first.count // micro
        parts = max(1, min(parts, affordable - 1))
        turn *= parts
        times = max(1, min(50, round(_TURN_SECONDS / max(turn, 1e-4))))
        self._console.phase(f"timing {len(able)} setups")
        for setup in able:
            is_costly = affordable < _CHEAP and setup.count * setup.threads == 1
            own = micro if is_costly else self._as_many_passes(setup, micro, first)
            rows.append(Timed(setup, own))
        round_seconds = len(rows) * times * turn * (1.5 if self._wakes else 1.0)
        turns = 2 if 2 * round_seconds < _FIRST_ROUND * left else 1
        with suppress(_OutOfTime):
            self._halve(
                rows,
                share=micro * parts,
                count=first.count,
                times=times,
                turns=turns,
                until=self._deadline - (1 - _SETUPS_SHARE) * left,
            )
        longest = min(rows, key=lambda row: (-len(row.steps), row.step_seconds))
        in_one_moment(rows, beside=longest, seconds=longest.step_seconds)
        self._climb(best_of(rows), rows)

    def _first_micro_batch(self, setup: WorkerSetup) -> tuple[int, float]:
        """The largest micro batch, within reason, whose passes take no long turn; and the turn's s.

        Small ones say little of a setup: what a pass costs to begin is most of their time.
        """
        micro, spent = 0, {"passes": 0.0, "update": 0.0}
        for larger in self._micro_batches(setup):
            expected = spent["passes"] * larger / max(1, micro)
            if micro and (larger * self._row_tokens > _MICRO_TOKENS or expected > _LONGEST_SECONDS):
                break
            found = self._turn_of(setup, micro=larger, samples=larger)
            if found and micro and found["passes"] > _SUSPICIOUS * expected:  # a bad moment
                again = self._turn_of(setup, micro=larger, samples=larger)
                found = min(found, again or found, key=lambda turn: turn["passes"])
            micro, spent = larger, found or spent
        return micro, spent["passes"] + spent["update"]

    def _as_many_passes(self, setup: WorkerSetup, micro: int, other: WorkerSetup) -> int:
        """The micro batch with which `setup` needs no fewer passes than `other` with `micro`."""
        same = micro * other.count // setup.count
        return max(n for n in self._micro_batches(setup) if n <= max(same, micro))

    def _climb(self, best: Timed, rows: list[Timed]) -> None:
        """Half and twice the micro batch of the best, and on in the direction that is faster."""
        known = {best.micro}
        while more := self._neighbours(best, known=known):
            self._console.phase(f"timing micro batches of {', '.join(map(str, more))} samples")
            found = self._beside(best, micros=more)
            known |= set(more)
            rows += found
            best, before = best_micro_batch([best, *found]), best
            if best is before:
                return

    def _micro_batches(self, setup: WorkerSetup) -> list[int]:
        return micro_batches_of(self._recipe, count=setup.count, row_tokens=self._row_tokens)

    def _neighbours(self, best: Timed, *, known: set[int]) -> list[int]:
        """Half and twice a micro batch, as far as they are not known and there is time."""
        near = [
            n
            for n in self._micro_batches(best.setup)
            if (n == 2 * best.micro or 2 * n == best.micro) and n not in known
        ]
        sample = best.step_seconds * best.setup.count / self._recipe.train.global_batch_samples
        left = self._deadline - time.monotonic()
        while near and (3 * len(near) + 2) * math.lcm(best.micro, *near) * sample > left:
            near.pop()
        return near

    def _beside(self, best: Timed, *, micros: Sequence[int]) -> list[Timed]:
        """`best` with other micro batches, in the same moments as itself anew."""
        again, rows = Timed(best.setup, best.micro), [Timed(best.setup, n) for n in micros]
        share = math.lcm(best.micro, *micros)
        with suppress(_OutOfTime):
            for row in rows:  # uses its memory for the first time
                self._turn_of(row.setup, micro=row.micro, samples=share)
            self._halve([again, *rows], share=share, count=best.setup.count)
        in_one_moment([*rows, again], beside=again, seconds=best.step_seconds)
        return rows

    def _warm_up(self, setups: Sequence[WorkerSetup], *, micro: int) -> None:
        """All at once: only what follows counts."""
        for setup in {_key(setup): setup for setup in reversed(setups)}.values():
            self._order(setup, micro=micro, samples=micro, times=1)
        chosen = [self._sets[_key(setup)] for setup in setups]
        self._hear(lambda: all(each.answer is not None or each.lost for each in chosen))

    def _halve(
        self,
        rows: list[Timed],
        *,
        share: int,
        count: int,
        times: int = 1,
        turns: int = 1,
        until: float = math.inf,
    ) -> None:
        """`turns` of each, two more of the better half, and so on, until `until` or the deadline.

        `share`: samples of one of `count` workers in a turn of `times` steps; a lone core gets no
        more than one worker's, or one micro batch.
        """
        alive = list(rows)
        while alive:
            for _ in range(turns):
                if time.monotonic() > until:
                    return
                for row in alive:
                    samples = share * (1 if row.is_one_core else count // row.setup.count)
                    samples = max(samples, row.micro)
                    self._turn(row, samples=samples, times=times)
            alive = [row for row in alive if not self._sets[_key(row.setup)].lost]
            alive.sort(key=lambda row: row.step_seconds)
            if len(alive) > 2:
                whole = [row for row in alive if not row.is_one_core]
                alive = list(dict.fromkeys([*alive[: math.ceil(len(alive) / 2)], *whole[:1]]))
            elif len(alive) < 2 or len(alive[1].steps) >= _MOST_TURNS or _is_clear(*alive):
                return
            turns = 2

    def _turn(self, row: Timed, *, samples: int, times: int) -> None:
        """One turn; the row then knows how long a whole step takes by it."""
        if self._sets[_key(row.setup)].lost:
            return
        if self._wakes:
            self._turn_of(row.setup, micro=row.micro, samples=max(1, row.micro // 2))
        spent = self._turn_of(row.setup, micro=row.micro, samples=samples, times=times)
        batch = self._recipe.train.global_batch_samples
        if spent:
            passes = spent["passes"] * batch / (row.setup.count * samples)
            row.steps.append(passes + spent["update"])

    def _turn_of(
        self, setup: WorkerSetup, *, micro: int, samples: int, times: int = 1
    ) -> dict[str, Any]:
        """What rank 0 says of a turn; empty when its workers are gone. Raises _OutOfTime."""
        key, own = (setup, micro, samples, times), self._sets[_key(setup)]
        began = time.monotonic()
        if began + self._costs.get(key, 0.0) > self._deadline:
            raise _OutOfTime
        self._order(setup, micro=micro, samples=samples, times=times)
        self._hear(lambda: own.answer is not None or own.lost)
        self._costs[key] = time.monotonic() - began
        return own.answer or {}

    def _order(self, setup: WorkerSetup, *, micro: int, samples: int, times: int) -> None:
        own = self._sets[_key(setup)]
        own.answer = None
        order = {"micro": micro, "samples": samples, "threads": setup.threads, "times": times}
        for worker in own.workers:
            self._pool.send(worker, order)

    def _hear(self, done: Callable[[], bool], *, until: float | None = None) -> None:
        """Listen until `done()` or `until`. Raises _OutOfTime at the deadline."""
        owners = {id(w): each for each in self._sets.values() for w in each.workers}
        every = [w for each in self._sets.values() for w in each.workers]
        while not done():
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise _OutOfTime
            if until is not None and time.monotonic() > until:
                return
            for worker, message in self._pool.events(timeout_seconds=min(left, 0.2), only=every):
                if id(worker) in owners:
                    self._note(owners[id(worker)], message)

    def _note(self, own: _WorkerSet, message: dict[str, Any] | None) -> None:
        if message is None:
            own.lost = True
        elif message["kind"] == "built":
            own.built = True
        elif message["kind"] == "turn":
            own.answer = message
        elif message["kind"] == "error":
            own.lost = True
            self.errors.append(message["text"])


def _is_clear(first: Timed, second: Timed) -> bool:
    """Whether enough turns say that the second is slower."""
    enough = len(second.steps) >= ENOUGH_TURNS
    return enough and second.step_seconds > CLOSE * first.step_seconds


def _key(setup: WorkerSetup) -> tuple[str, int]:
    """Setups of one key share their workers: a lone one computes with any number of cores."""
    return (setup.workers, setup.count) if setup.count > 1 else ("processes", 1)
