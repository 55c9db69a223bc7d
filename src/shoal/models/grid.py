"""Weights on a grid of whole numbers with a scale for each row, or each group of a row's inputs.

Symmetric: a weight is code x scale, with codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1, so that 0
is a code and no sign has one more. Shapes: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.errors import UserError


@dataclass(frozen=True)
class Grid:
    """`group`: inputs that share a scale; None: a whole row. `half`: scales are of 16 bits."""

    bits: int
    group: int | None = None
    half: bool = False

    @property
    def most(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1)) - 1

    def groups(self, inputs: int) -> int:
        """Scales of a row. Raises UserError for inputs that groups do not divide."""
        if self.group is None:
            return 1
        if inputs % self.group:
            raise UserError(
                f"--group {self.group} does not divide the {inputs} inputs of a layer; "
                f"give one that does, such as {_divisor(inputs, self.group)}"
            )
        return inputs // self.group

    def scales(self, part: Tensor) -> Tensor:
        """Of weights [O, n] that share one each: [O, 1], so that the largest is a code."""
        largest = part.abs().amax(dim=1, keepdim=True) / self.most
        if self.half:
            largest = largest.half().to(part.dtype)
        return torch.where(largest > 0, largest, torch.ones_like(largest))

    def codes(self, part: Tensor, scales: Tensor) -> Tensor:
        """The nearest codes of weights [O, n], as floats."""
        return (part / scales).round_().clamp_(-self.most, self.most)


def _divisor(inputs: int, near: int) -> int:
    return next(each for each in range(min(near, inputs), 0, -1) if inputs % each == 0)


@dataclass(frozen=True)
class Coded:
    """A weight on a grid."""

    codes: Tensor
    """int8 [O, I]."""
    scales: Tensor
    """float32 [O, G]."""
    grid: Grid

    def weight(self) -> Tensor:
        """float32 [O, I]."""
        each = self.codes.shape[1] // self.scales.shape[1]
        return self.codes.float() * self.scales.repeat_interleave(each, dim=1)


def nearest(weight: Tensor, grid: Grid) -> Coded:
    """Each weight [O, I] at the nearest point of the grid."""
    outputs, inputs = weight.shape
    parts = weight.reshape(outputs * grid.groups(inputs), -1)
    scales = grid.scales(parts)
    codes = grid.codes(parts, scales).to(torch.int8).view(outputs, inputs)
    return Coded(codes, scales.view(outputs, -1), grid)
