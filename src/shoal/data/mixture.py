"""Weighted mixtures: which source each sample slot of the run comes from, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

LONGEST_PERIOD = 1 << 16
"""Weights that need a longer period to be exact are rounded to multiples of its inverse."""


class Mixture:
    """Slot number (step x global batch + place in it) -> source, repeating with a short period.

    Within a period of P slots source s has exactly `per_period[s]`, spread evenly; so after any
    number of slots each source is within one sample per source of its share, and the count of a
    source before any slot is one division and one look-up.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"weights: expected one or more positive numbers, got {weights!r}")
        self.per_period = _whole_weights(weights)
        counts = np.asarray(self.per_period)
        owner = np.repeat(np.arange(len(counts)), counts)
        within = np.concatenate([np.arange(count) for count in counts])
        # The k-th of c samples belongs at (k + 1/2) / c of the period, told in 2**20ths of a slot:
        # integers, so that every machine orders them alike. Ties go to the earlier source.
        due = ((2 * within + 1) * len(owner) << 20) // (2 * counts[owner])
        self._source = owner[np.lexsort((owner, due))]
        taken = self._source[None, :] == np.arange(len(counts))[:, None]
        self._before = np.concatenate(
            [np.zeros((len(counts), 1), dtype=np.int64), np.cumsum(taken, axis=1)], axis=1
        )

    @property
    def period(self) -> int:
        """Slots after which the pattern repeats."""
        return len(self._source)

    def at(self, slots: Ints) -> tuple[Ints, Ints]:
        """(source, running number of the sample within that source) of each slot [n]."""
        cycle, place = np.divmod(slots, self.period)
        source = self._source[place]
        per_period = np.asarray(self.per_period)[source]
        return source, cycle * per_period + self._before[source, place]

    def before(self, slot: int) -> list[int]:
        """Samples taken from each source before `slot`: all the state that a run has."""
        cycle, place = divmod(slot, self.period)
        return [
            cycle * count + int(before[place])
            for count, before in zip(self.per_period, self._before)
        ]


def _whole_weights(weights: Sequence[float]) -> list[int]:
    """Integers in proportion to `weights`, exactly when a period of LONGEST_PERIOD allows it."""
    exact = [Fraction(weight) for weight in weights]
    # The nearest simple fractions: what was meant by 0.1 or 1/3, whose floats are not that.
    shares = [(weight / sum(exact)).limit_denominator(LONGEST_PERIOD) for weight in exact]
    period = lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD and sum(shares) == 1 and min(shares) > 0:
        return [int(share * period) for share in shares]
    shares = [weight / sum(exact) for weight in exact]
    counts = [max(1, int(share * LONGEST_PERIOD)) for share in shares]
    rest = [share * LONGEST_PERIOD - count for share, count in zip(shares, counts)]
    for index in sorted(range(len(rest)), key=lambda i: (-rest[i], i)):
        if sum(counts) < LONGEST_PERIOD:
            counts[index] += 1
    return counts
