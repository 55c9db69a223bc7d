"""How fast one worker of a measured machine is: its times, interpolated over shapes and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import exp, log, log2

from shoal.errors import UserError
from shoal.plan.workload import WIDER

Key = tuple[str | int | float, ...]


@dataclass(frozen=True)
class Rates:
    """Seconds by what was timed; all figures of one worker in one company of workers.

    Keys: ("product", precision, kind, tokens, columns, depth), ("attention", precision, tokens of
    a row, head size) per token and head, ("stream", bytes), ("update",) per parameter, ("reduce",
    ranks, bytes), and, fitted to whole blocks (plan/calibrate.py), ("host" | "byte" | "start" |
    "logit", precision, kind of block): seconds per block, per byte of elementwise traffic, per
    micro batch, and per logit.
    """

    seconds: Mapping[Key, float]

    def blended(self, other: Rates, *, share: float) -> Rates:
        """Geometric mean, with weight `share` for `other`; only of what both have."""
        pairs = {key: (one, other.seconds.get(key)) for key, one in self.seconds.items()}
        return Rates(
            {
                key: exp((1 - share) * log(one) + share * log(two))
                for key, (one, two) in pairs.items()
                if two is not None
            }
        )

    def scaled(self, factor: float) -> Rates:
        """Everything that much slower."""
        return Rates({key: value * factor for key, value in self.seconds.items()})

    @cached_property
    def _products(self) -> dict[tuple[str, str], list[tuple[tuple[float, ...], float]]]:
        """By precision and kind: (log2 of the shape, log of FLOPs per second)."""
        found: dict[tuple[str, str], list[tuple[tuple[float, ...], float]]] = {}
        for key, seconds in self.seconds.items():
            if key[0] == "product":
                sizes = [float(size) for size in key[3:]]
                rate = 2.0 * sizes[0] * sizes[1] * sizes[2] / seconds
                place = tuple(log2(size) for size in sizes)
                found.setdefault((str(key[1]), str(key[2])), []).append((place, log(rate)))
        return found

    def precision(self, wanted: str) -> str:
        """`wanted`, or the next wider format that was timed. Raises UserError without any."""
        known = {precision for precision, _ in self._products}
        for name in WIDER[wanted]:
            if name in known:
                return name
        raise UserError(
            f"this machine was not measured in {wanted} nor in a wider format; known: "
            f"{', '.join(sorted(known))}. Measure it anew: shoal plan --calibrate"
        )

    def peak(self, precision: str) -> float:
        """FLOPs per second of the fastest product."""
        rows = [row for key, rows in self._products.items() if key[0] == precision for row in rows]
        return exp(max(rate for _, rate in rows))

    def product(
        self, kind: str, *, precision: str, tokens: float, columns: float, depth: float
    ) -> float:
        """Seconds of one product of a linear layer of `depth` inputs and `columns` outputs.

        The rate is the mean of the measured ones, weighted by nearness in shape (inverse square
        of the distance in doublings).
        """
        place = (log2(tokens), log2(columns), log2(depth))
        total = weights = 0.0
        for other, rate in self._products[self.precision(precision), kind]:
            far = sum((a - b) ** 2 for a, b in zip(place, other, strict=True))
            weight = 1.0 / (far + 0.1) ** 2
            total += weight * rate
            weights += weight
        return 2.0 * tokens * columns * depth / exp(total / weights)

    def attention(self, *, precision: str, row: float, head_size: float) -> float:
        """Seconds per token and head, both passes, for rows of `row` tokens.

        Scores cost row x head size per token and head; the rate is that of the nearest row
        lengths, interpolated. Of another format where this one's was not timed.
        """
        timed = {str(key[1]) for key in self.seconds if key[0] == "attention"}
        name = next((name for name in _nearest(precision) if name in timed), precision)
        points = {
            float(key[2]): seconds / (float(key[2]) * float(key[3]))
            for key, seconds in self.seconds.items()
            if key[:2] == ("attention", name)
        }
        return row * head_size * _between(points, at=row)

    def stream(self, num_bytes: float) -> float:
        """Seconds to move so many bytes, read and written counted."""
        points = {
            float(key[1]): seconds / float(key[1])
            for key, seconds in self.seconds.items()
            if key[0] == "stream"
        }
        return num_bytes * _between(points, at=num_bytes)

    def reduce(self, num_bytes: float, *, ranks: int) -> float:
        """Seconds to sum a flat gradient over `ranks` replicas.

        Between measured numbers of ranks the nearest stands in, its time over its ring's bytes.
        """
        known = {int(key[1]) for key in self.seconds if key[0] == "reduce"}
        if not known:
            return 0.0
        near = min(known, key=lambda count: abs(log2(count / ranks)))
        points = {
            float(key[2]): seconds
            for key, seconds in self.seconds.items()
            if key[:2] == ("reduce", near)
        }
        share = (1 - 1 / ranks) / (1 - 1 / near)
        largest = max(points)
        beyond = num_bytes / largest if num_bytes > largest else 1.0
        return share * beyond * _between(points, at=num_bytes)

    def block(self, what: str, *, precision: str, kind: str) -> float:
        """A fitted figure of whole blocks; of the other kind of block where this was not timed."""
        for name in _nearest(precision):
            for shape in (kind, "gated", "plain"):
                found = self.seconds.get((what, name, shape))
                if found is not None:
                    return found
        return 0.0

    @property
    def update(self) -> float:
        """Seconds per parameter of zeroing, norm, scaling and the optimizer's step."""
        return self.seconds.get(("update",), 0.0)


def _nearest(precision: str) -> tuple[str, ...]:
    """Formats whose times may stand in for this one's, the best first."""
    return (*WIDER[precision], "bf16")


def _between(points: Mapping[float, float], *, at: float) -> float:
    """Interpolated in the logarithms of both; the nearest end outside. 0 without points."""
    if not points:
        return 0.0
    places = sorted(points)
    low = max((place for place in places if place <= at), default=places[0])
    high = min((place for place in places if place >= at), default=places[-1])
    if low == high:
        return points[low]
    share = log(at / low) / log(high / low)
    return exp((1 - share) * log(points[low]) + share * log(points[high]))
