"""The ways to use a CPU's cores that a recipe leaves open, and what was timed of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Literal

import msgspec

from shoal.config.recipe import Recipe
from shoal.engine.decision import WorkerSetup
from shoal.launch.refuse import combination_of
from shoal.layout import Layout
from shoal.legal import OWN_PARAMETERS, fits_schedule, problems

CLOSE = 1.05
"""Candidates within this factor are not told apart."""

_TIED = 1.03  # setups within this factor: the first by rule

ENOUGH_TURNS = 3
"""In so many one core must have been faster, or all are used."""

_MANY_TURNS = 5
_MARGIN = 1.25  # of one core in fewer turns: a lone worker is not held up by others, and looks fast

_MOST_TOKENS = 2048
"""Of a micro batch: more is no faster and leaves the caches."""


@dataclass(eq=False)
class Timed:
    """One candidate and the seconds of a whole step, by each of its turns."""

    setup: WorkerSetup
    micro: int
    steps: list[float] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """Median of the turns; without any, never the best."""
        return median(self.steps) if self.steps else math.inf

    @property
    def is_one_core(self) -> bool:
        """Whether it leaves all other cores idle."""
        return self.setup.count * self.setup.threads == 1

    def to_json(self) -> dict[str, Any]:
        """As kept in plan.json and in the cache."""
        return {**asdict(self), "step_seconds": self.step_seconds}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Timed:
        """The inverse; raises ValueError for what is none."""
        row = msgspec.convert(tree, type=cls)
        if not row.steps or min(*row.steps, row.micro, row.setup.count, row.setup.threads) <= 0:
            raise ValueError("no turns, or one that took no time")
        return row


def setups_of(recipe: Recipe, *, cores: int) -> list[WorkerSetup]:
    """What may be timed, by rule; the first is what is used where nothing was timed.

    All cores as threads, as processes, as fewer workers of several cores where there are many, as
    one worker; and one worker with one core. What the recipe fixes is fixed.
    """
    launch, given = recipe.launch, recipe.parallel.replicas
    most = most_replicas(recipe, at_most=cores)
    changes = recipe.sync.kind == "hogwild" or recipe.sync.kind in OWN_PARAMETERS
    if changes or recipe.sync.codec.kind != "none":
        given = given or most  # their number bears on what is learned, not on speed alone
    middle = [n for n in range(2, most) if most % n == 0 and n * n >= most][:1] if most > 4 else []
    counts = [given] if given is not None else list(dict.fromkeys([most, *middle, 1]))
    found = []
    for count in counts:
        threads = launch.threads_per_worker
        each = max(1, cores // count) if threads == "auto" else threads
        found += [WorkerSetup(kind, count, each) for kind in _kinds(recipe, count=count)]
    if 1 in counts and launch.threads_per_worker == "auto":
        found.append(WorkerSetup("processes", 1, 1))
    return list(dict.fromkeys(found))


def _kinds(recipe: Recipe, *, count: int) -> list[Literal["threads", "processes"]]:
    """Kinds of workers that `count` replicas may be; a lone one is a process."""
    asked = combination_of(recipe, Layout(replicate=count))
    kinds: tuple[Literal["threads", "processes"], ...] = ("threads", "processes")
    return [
        kind
        for kind in (kinds if count > 1 else kinds[1:])
        if recipe.launch.workers in ("auto", kind) or count == 1
        if not problems(replace(asked, workers=kind))
    ]


def most_replicas(recipe: Recipe, *, at_most: int, shards: int = 1) -> int:
    """The largest degree that divides the global batch (of one shard) into whole micro batches, of
    which there are enough for a pipeline."""
    given = recipe.parallel.pipelining
    micro = recipe.train.micro_batch_samples
    batch = recipe.train.global_batch_samples // shards // (1 if micro == "auto" else micro)
    able = [n for n in range(1, max(1, min(at_most, batch)) + 1) if batch % n == 0]
    name, ranks = given.schedule, given.degree
    filled = [n for n in able if fits_schedule(name, ranks=ranks, micro_batches=batch // n)]
    return max(filled or [1])


def micro_batches_of(recipe: Recipe, *, count: int, row_tokens: int) -> list[int]:
    """Micro batches that `count` workers can take, ascending: divisors of a share of the batch."""
    if recipe.train.micro_batch_samples != "auto":
        return [recipe.train.micro_batch_samples]
    share = recipe.train.global_batch_samples // count
    most = max(1, _MOST_TOKENS // row_tokens)
    return [n for n in range(1, min(share, most) + 1) if share % n == 0]


def best_of(rows: Sequence[Timed]) -> Timed:
    """The fastest; of setups that tie, the first by rule (threads share the parameters).

    One core only where it was clearly faster than all cores in three turns; by a quarter, unless
    there were more turns.
    """
    whole = [row for row in rows if not row.is_one_core] or list(rows)
    limit = _TIED * min(row.step_seconds for row in whole)
    first = next(row for row in whole if row.step_seconds <= limit)
    best = best_micro_batch([row for row in whole if row.setup == first.setup])
    for row in rows:
        margin = CLOSE if len(row.steps) >= _MANY_TURNS else _MARGIN
        faster = sum(margin * seconds < best.step_seconds for seconds in row.steps)
        if row.is_one_core and faster >= ENOUGH_TURNS and row.step_seconds < best.step_seconds:
            best = row
    return best


def best_micro_batch(rows: Sequence[Timed]) -> Timed:
    """Of one setup's: the largest of those that are not told apart: it has fewer passes."""
    limit = CLOSE * min(row.step_seconds for row in rows)
    return max((row for row in rows if row.step_seconds <= limit), key=lambda row: row.micro)


def in_one_moment(rows: Sequence[Timed], *, beside: Timed, seconds: float) -> None:
    """Turns as if taken while `beside` took `seconds`: what was timed longer saw other moments."""
    theirs = list(beside.steps)
    for row in rows:
        row.steps = [seconds * a / b for a, b in zip(row.steps, theirs, strict=False)]


def described(rows: Sequence[Timed], best: Timed, *, when: str) -> str:
    """The choice in one line: its step, that of the next best setups, and when it was timed."""
    others: dict[WorkerSetup, Timed] = {}
    for row in sorted(rows, key=lambda row: row.step_seconds):
        if row.setup != best.setup:
            others.setdefault(row.setup, row)
    beside = [f"{setup} {row.step_seconds:.3g} s" for setup, row in others.items()][:2]
    ahead = f"{', '.join(beside)}; " if beside else ""
    return f"{best.step_seconds:.3g} s a step ({ahead}{when})"


def table(rows: Sequence[Timed], *, best: Timed) -> Iterator[str]:
    """The candidates, the fastest first."""
    yield f"     {'setup':32} {'micro batch':>11} {'s a step':>9} {'turns':>6}"
    for row in sorted(rows, key=lambda row: row.step_seconds):
        mark = "->" if row is best else "  "
        yield (
            f"  {mark} {row.setup!s:32} {row.micro:>11} {row.step_seconds:>9.3g} "
            f"{len(row.steps):>6}"
        )
