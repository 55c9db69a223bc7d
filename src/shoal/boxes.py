"""Boxes: rectangles of a parameter, what two of them share, and pieces of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Generic, TypeVar

Values = TypeVar("Values")
"""Whatever is indexed by slices: a torch tensor, an array (this layer imports neither)."""


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

    @property
    def slices(self) -> tuple[slice, ...]:
        """This box as slices of the whole tensor."""
        return tuple(slice(at, at + size) for at, size in zip(self.offsets, self.sizes))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the box lies inside a tensor of `shape`."""
        return len(shape) == len(self.offsets) == len(self.sizes) and all(
            start >= 0 and size >= 0 and start + size <= whole
            for start, size, whole in zip(self.offsets, self.sizes, shape)
        )

    def intersection(self, other: Box) -> Box | None:
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


@dataclass(frozen=True)
class Slot:
    """One box of a parameter, and where in a rank's tensor it begins (per dim)."""

    box: Box
    begins: tuple[int, ...]

    def of(self, tensor: Values) -> Values:
        """The part of `tensor`, which lies as the parameter's storage does; a view."""
        indexable: Any = tensor
        part: Values = indexable[Box(self.begins, self.box.sizes).slices]
        return part


@dataclass(frozen=True)
class Piece(Generic[Values]):
    """One box of a named tensor with its values: `tensor` has the sizes of the box.

    `kind`: parameter, gradient, or the name of an optimizer state. `shape`: of the whole.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    box: Box
    tensor: Values = field(repr=False)
