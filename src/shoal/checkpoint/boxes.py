"""Boxes: rectangles of a parameter, and what two of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """Elements `offsets[d]` to `offsets[d] + sizes[d]` of each dim d."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that is the whole of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    def meet(self, other: Box) -> Box | None:
        """The common part, or None when there is none."""
        low = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets))
        high = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes)
        )
        sizes = tuple(h - lo for lo, h in zip(low, high))
        if any(size <= 0 for size in sizes):
            return None
        return Box(low, sizes)

    def within(self, outer: Box) -> tuple[slice, ...]:
        """This box as slices of a tensor that holds `outer`."""
        return tuple(
            slice(at - base, at - base + size)
            for at, base, size in zip(self.offsets, outer.offsets, self.sizes)
        )
