"""Numbers that stand out: a loss above the recent ones, gradients that dwarf other ranks'."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

WINDOW = 50
LOSS_DEVIATIONS = 10.0
"""Robust standard deviations (1.4826 x median absolute deviation) above the median."""
NORM_RATIO = 20.0
"""Times the median norm of the other ranks, and of this run's recent norms."""


class Outliers:
    """Looks at each committed step."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    @staticmethod
    def not_finite(norms: Sequence[float]) -> list[int]:
        """Ranks whose gradients hold NaN or infinity."""
        return [rank for rank, norm in enumerate(norms) if not math.isfinite(norm)]

    def look(self, *, loss: float, norms: Sequence[float]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(event, fields) for what is odd; norms: one per rank, all finite."""
        usual = self._usual()
        if usual is not None and loss > usual[0] + LOSS_DEVIATIONS * usual[1]:
            text = f"loss {loss:.4g} stands out from the last {len(self._losses)}: {usual[0]:.4g}"
            yield "loss-spike", {"loss": loss, "text": text}
        self._losses.append(loss)
        for rank, norm in enumerate(norms):
            others = [other for number, other in enumerate(norms) if number != rank]
            rest = statistics.median([*others, *self._norms])
            if rest > 0 and norm > NORM_RATIO * rest and norm > NORM_RATIO * max(others):
                text = f"gradients of rank {rank} have norm {norm:.3g}, the others {rest:.3g}"
                yield "gradient-outlier", {"rank": rank, "norm": norm, "text": text}
        self._norms.extend(norms)

    def _usual(self) -> tuple[float, float] | None:
        """Median and robust deviation of the recent losses; None while there are too few."""
        if len(self._losses) < WINDOW // 2:
            return None
        middle = statistics.median(self._losses)
        spread = statistics.median(abs(value - middle) for value in self._losses)
        return middle, max(1.4826 * spread, 0.01 * abs(middle))
