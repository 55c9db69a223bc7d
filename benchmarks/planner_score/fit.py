"""Fits the physical constants to a table, and says how well a source is met without seeing it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from math import log
from pathlib import Path

from planner_score.profiles import FSDP, GENERIC, MEGATRON_CLASSIC
from planner_score.score import median, score_case
from planner_score.table import Case, cases, read_rows
from shoal.plan.cost.constants import DEFAULT, Constants
from shoal.plan.software import Software

RANGES: dict[str, tuple[float, float, float]] = {
    "sustained_volta": (0.9, 0.6, 1.0),
    "sustained_ampere": (0.9, 0.6, 0.95),
    "sustained_hopper": (0.85, 0.6, 0.9),
    "sustained_blackwell": (0.85, 0.6, 0.9),
    "sustained_fp8": (0.9, 0.6, 0.95),
    "tile_seconds": (1e-6, 1e-7, 2e-6),
    "wave_loss": (0.5, 0.1, 1.0),
    "cast_bytes": (4.0, 1.0, 8.0),
    "narrow_cast_bytes": (10.0, 2.0, 30.0),
    "half_row": (500.0, 100.0, 1500.0),
    "first_attention": (0.5, 0.3, 0.8),
    "modern_attention": (1.6, 1.2, 2.0),
    "score_bytes": (30.0, 15.0, 45.0),
    "link_share": (0.75, 0.5, 0.9),
    "network_share": (0.75, 0.4, 0.9),
    "network_hop_seconds": (40e-6, 5e-6, 2e-4),
    "cloud_hop_seconds": (200e-6, 5e-5, 1e-3),
    "contention": (0.1, 0.01, 0.3),
}
"""Each fitted constant: a guess before any row was seen (papers, data sheets, round figures), and
the least and most that it may be without losing its meaning."""

PRIOR = Constants(**{name: guess for name, (guess, _, _) in RANGES.items()})

_MOST_ROWS = 150
_PULL = 0.002  # weight of the squared log distance from the prior: data win, noise does not


def sources_of(path: Path) -> dict[str, list[Case]]:
    """Timed cases by source, at most 150 of each, evenly taken, without rows of low use."""
    grouped: dict[str, list[Case]] = defaultdict(list)
    for case in cases(read_rows(path), path=str(path)):
        if not isinstance(case, tuple) and case.step_seconds and not score_case(case).is_low:
            grouped[case.source].append(case)
    return {name: found[:: max(1, -(-len(found) // _MOST_ROWS))] for name, found in grouped.items()}


def error_of(found: Sequence[Case], *, constants: Constants) -> float:
    """Median absolute error of the step time, as a fraction."""
    return median([abs(score_case(case, constants=constants).time_error) for case in found])


def loss(sources: Mapping[str, Sequence[Case]], *, constants: Constants) -> float:
    """Mean absolute log error (at most 0.8 a row), pulled to the prior.

    A source counts with the square root of its rows: a large one says more, but its software is
    still one program.
    """
    total = weights = 0.0
    for found in sources.values():
        errors = [
            min(0.8, abs(log(1 + score_case(case, constants=constants).time_error)))
            for case in found
        ]
        weight = len(errors) ** 0.5
        total += weight * sum(errors) / len(errors)
        weights += weight
    pull = sum(log(getattr(constants, name) / getattr(PRIOR, name)) ** 2 for name in RANGES)
    return total / weights + _PULL * pull


def fit(sources: Mapping[str, Sequence[Case]], *, sweeps: int = 2) -> Constants:
    """Coordinate descent from the prior, one constant after the other, with shrinking steps."""
    best = PRIOR
    lowest = loss(sources, constants=best)
    step = 1.3
    for _ in range(sweeps):
        for name, (_, low, high) in RANGES.items():
            for factor in (step, 1 / step):
                while True:
                    value = min(high, max(low, getattr(best, name) * factor))
                    tried = replace(best, **{name: value})
                    found = loss(sources, constants=tried)
                    if value == getattr(best, name) or found >= lowest - 1e-6:
                        break
                    best, lowest = tried, found
        step = step**0.5
    return best


def as_unknown(case: Case) -> Case:
    """The case as if its software had never been seen: the nearest profile of another source."""
    named = case.software.name
    stand_in: Software | None = {
        "nanotron": GENERIC,
        "nanotron-early": GENERIC,
        "foundry": FSDP,
        "oneflow": MEGATRON_CLASSIC,
        "gpt-neox": MEGATRON_CLASSIC,
        "deepspeed-2021": MEGATRON_CLASSIC,
    }.get(named)
    if stand_in is None:
        return case
    kept = {
        field.name: getattr(case.software, field.name)
        for field in fields(Software)
        if field.name in {"flash", "sequence_parallel", "balanced_stages"}
    }
    return replace(case, software=replace(stand_in, **kept))


def leave_one_out(path: Path) -> dict[str, float]:
    """Median error on each source of at least 8 rows with constants fitted without it.

    The source's own software profile is taken away as well (see `as_unknown`), so that this is
    what a user of unseen software would meet.
    """
    sources = sources_of(path)
    result = {}
    for name, held_out in sources.items():
        if len(held_out) < 8:
            continue
        rest = {other: found[::3] for other, found in sources.items() if other != name}
        constants = fit(rest, sweeps=3) if rest else DEFAULT
        result[name] = error_of([as_unknown(case) for case in held_out], constants=constants)
    return result
