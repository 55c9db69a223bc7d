"""Frozen matrices in 8 bits, beside which adapters are trained in full precision.

Each row of W [out, in] becomes whole numbers of -127 to 127 and one float32 scale, its largest
magnitude / 127 (symmetric, round to nearest; Dettmers et al., arXiv 2208.07339, section 2.1). A
product makes the matrix float again for its own length only, in the forward and in the backward
pass, so that a layer keeps a byte an element between them. What is trained is thus an adapter of
the rounded matrix, and the rounded matrix is what it is folded into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.models.grid import Grid
from shoal.models.grid import nearest as on_grid

_GRID = Grid(8)
"""Of whole rows."""
_ALIGN = 16
"""Floats: every part begins at a 64-byte border."""


@dataclass
class Int8Weight:
    """W [out, in] as `codes` int8 [out, in] and `scales` float32 [out]: W = codes x scales."""

    codes: Tensor
    scales: Tensor

    def restored(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [out, in] as floating-point numbers."""
        scales = self.scales.double() if dtype == torch.float64 else self.scales
        return torch.mul(self.codes, scales[:, None]).to(dtype)

    @torch.no_grad()
    def copy_(self, weight: Tensor) -> None:
        """Round `weight` [out, in] into this memory."""
        rounded = nearest(weight.float())
        self.codes.copy_(rounded.codes)
        self.scales.copy_(rounded.scales)

    def product(self, hidden: Tensor) -> Tensor:
        """x W^T: [..., in] -> [..., out], in the type that autocast has it in."""
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        product: Tensor = _Product.apply(hidden, self.codes, self.scales)
        return product


def nearest(weight: Tensor) -> Int8Weight:
    """Each row of `weight` [n, in] on its own grid of 255 points; a row of zeros stays zeros."""
    found = on_grid(weight, _GRID)
    return Int8Weight(found.codes, found.scales[:, 0].contiguous())


def rounded(weight: Tensor, *, turned: bool = False) -> Tensor:
    """What remains of rows [n, in] in 8 bits, as float32; `turned`: given as [in, n]."""
    if turned:
        return nearest(weight.t()).restored().t()
    return nearest(weight).restored()


class _Product(torch.autograd.Function):
    """A product with a matrix that is float for its own length only."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return torch.nn.functional.linear(hidden, Int8Weight(codes, scales).restored(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        codes, scales = ctx.saved_tensors
        (outer,) = gradients
        return outer @ Int8Weight(codes, scales).restored(outer.dtype), None, None


def floats_of(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Length of the float32 buffer that `in_buffer` divides."""
    return sum(_up(out) + _up(-(-out * inputs // 4)) for out, inputs in shapes.values())


def in_buffer(shapes: Mapping[str, tuple[int, int]], flat: Tensor) -> dict[str, Int8Weight]:
    """A weight for each shape [out, in], in the memory of `flat`, float32 [floats_of(shapes)]."""
    weights, at = dict[str, Int8Weight](), 0
    for name, (out, inputs) in shapes.items():
        scales = flat[at : at + out]
        at += _up(out)
        bytes_of = flat[at : at + _up(-(-out * inputs // 4))].view(torch.int8)
        weights[name] = Int8Weight(bytes_of[: out * inputs].view(out, inputs), scales)
        at += _up(-(-out * inputs // 4))
    return weights


def _up(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN
