"""Frozen matrices in 8 or 4 bits, beside which adapters are trained in full precision.

int8: each row of W [out, in] becomes whole numbers of -127 to 127 and one float32 scale, its
largest magnitude / 127 (symmetric, round to nearest; Dettmers et al., arXiv 2208.07339, section
2.1). nf4: every 64 inputs of a row share a float32 scale, their largest magnitude, and each is the
nearest of 16 levels, quantiles of a normal distribution (Dettmers et al., QLoRA, arXiv 2305.14314,
section 3 and appendix E). A product makes the matrix float again for its own length only, in the
forward and in the backward pass, so that a layer keeps a byte or 9/16 of one an element between
them. What is trained is thus an adapter of the rounded matrix, and the rounded matrix is what it is
folded into.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.models.grid import Grid
from shoal.models.grid import nearest as on_grid

_GRID = Grid(8)
"""Of whole rows."""
_ALIGN = 16
"""Floats: every part begins at a 64-byte border."""
_BLOCK = 64
"""Inputs that share a scale in nf4."""
# fmt: off
_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on
"""NormalFloat4, as QLoRA's appendix E lists it."""


class Form(Protocol):
    """How a matrix [out, in] is kept: as codes of 8 bits, and scales in float32."""

    codes: torch.dtype

    def shapes(self, out: int, inputs: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of its codes and of its scales."""

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of rows [n, in], each by itself; zeros stay zeros."""

    def restore(self, codes: Tensor, scales: Tensor, *, inputs: int) -> Tensor:
        """The rows [n, inputs] in the type of `scales`."""


class _Int8:
    codes = torch.int8

    def shapes(self, out: int, inputs: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (out, inputs), (out, 1)

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        found = on_grid(weight, _GRID)
        return found.codes, found.scales

    def restore(self, codes: Tensor, scales: Tensor, *, inputs: int) -> Tensor:
        return torch.mul(codes, scales)


class _NF4:
    codes = torch.uint8

    def shapes(self, out: int, inputs: int) -> tuple[tuple[int, int], tuple[int, int]]:
        blocks = -(-inputs // _BLOCK)  # the last of a row may be short
        return (out, blocks * _BLOCK // 2), (out, blocks)

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, inputs = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -inputs % _BLOCK))
        blocks = padded.view(rows, -1, _BLOCK)
        scales = blocks.abs().amax(dim=2)
        relative = blocks / torch.where(scales > 0, scales, 1.0)[:, :, None]
        levels = torch.tensor(_LEVELS, device=weight.device)
        between = (levels[1:] + levels[:-1]) / 2
        level = torch.bucketize(relative, between).to(torch.uint8).view(rows, -1, 2)
        return level[:, :, 0] * 16 + level[:, :, 1], scales

    def restore(self, codes: Tensor, scales: Tensor, *, inputs: int) -> Tensor:
        rows = len(codes)
        pairs = torch.nn.functional.embedding(codes.int(), _pairs(scales.dtype, scales.device))
        blocks = pairs.view(rows, -1, _BLOCK) * scales[:, :, None]
        return blocks.view(rows, -1)[:, :inputs]


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two levels of each byte [256, 2]."""
    levels = torch.tensor(_LEVELS, dtype=torch.float32, device=device).to(dtype)
    return torch.cartesian_prod(levels, levels)


FORMS: dict[str, Form] = {"int8": _Int8(), "nf4": _NF4()}


@dataclass
class RoundedWeight:
    """W [out, inputs] in memory that `form` divides."""

    form: Form
    codes: Tensor
    scales: Tensor
    inputs: int

    def restored(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [out, in] as floating-point numbers."""
        scales = self.scales.double() if dtype == torch.float64 else self.scales
        return self.form.restore(self.codes, scales, inputs=self.inputs).to(dtype)

    @torch.no_grad()
    def copy_(self, weight: Tensor) -> None:
        """Round `weight` [out, in] into this memory."""
        codes, scales = self.form.round(weight.float())
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def product(self, hidden: Tensor) -> Tensor:
        """x W^T: [..., in] -> [..., out], in the type that autocast has it in."""
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        product: Tensor = _Product.apply(hidden, self.codes, self.scales, self.form, self.inputs)
        return product


def nearest(weight: Tensor, form: str) -> RoundedWeight:
    """Each row of `weight` [n, in] by itself."""
    found = FORMS[form]
    codes, scales = found.round(weight)
    return RoundedWeight(found, codes, scales, weight.shape[1])


def rounded(weight: Tensor, form: str, *, turned: bool = False) -> Tensor:
    """What remains of rows [n, in], as float32; `turned`: given as [in, n]."""
    if turned:
        return nearest(weight.t(), form).restored().t()
    return nearest(weight, form).restored()


class _Product(torch.autograd.Function):
    """A product with a matrix that is float for its own length only."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, codes: Tensor, scales: Tensor, form: Form, inputs: int
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.form, ctx.inputs = form, inputs
        weight = RoundedWeight(form, codes, scales, inputs)
        return torch.nn.functional.linear(hidden, weight.restored(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (outer,) = gradients
        codes, scales = ctx.saved_tensors
        weight = RoundedWeight(ctx.form, codes, scales, ctx.inputs)
        return outer @ weight.restored(outer.dtype), None, None, None, None


def floats_of(shapes: Mapping[str, tuple[int, int]], form: str) -> int:
    """Length of the float32 buffer that `in_buffer` divides."""
    return sum(sum(_floats(FORMS[form], *shape)) for shape in shapes.values())


def in_buffer(
    shapes: Mapping[str, tuple[int, int]], flat: Tensor, form: str
) -> dict[str, RoundedWeight]:
    """A weight for each shape [out, in], in the memory of `flat`, float32 [floats_of(shapes)]."""
    kept, weights, at = FORMS[form], dict[str, RoundedWeight](), 0
    for name, (out, inputs) in shapes.items():
        of_codes, of_scales = kept.shapes(out, inputs)
        for_scales, for_codes = _floats(kept, out, inputs)
        scales = flat[at : at + math.prod(of_scales)].view(of_scales)
        at += for_scales
        codes = flat[at : at + for_codes].view(kept.codes)[: math.prod(of_codes)].view(of_codes)
        at += for_codes
        weights[name] = RoundedWeight(kept, codes, scales, inputs)
    return weights


def _floats(form: Form, out: int, inputs: int) -> tuple[int, int]:
    """Floats that its scales take, and its codes."""
    codes, scales = form.shapes(out, inputs)
    return _up(math.prod(scales)), _up(-(-math.prod(codes) // 4))


def _up(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN
