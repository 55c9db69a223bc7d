"""Training on the grid: linear layers of the blocks compute with rounded weights.

The weights stay floats and are rounded in every forward as `shoal compress` will round them, to the
bit; the gradient of the rounded weight is taken for that of the weight itself (Bengio et al.,
arXiv 1308.3432, straight-through; Jacob et al., arXiv 1712.05877, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.models.grid import Grid, nearest
from shoal.models.placement import is_transposed


@dataclass(frozen=True)
class GridSettings:
    """Which grid, and which layers are not on it."""

    grid: Grid
    keep: tuple[str, ...] = ()
    """Parts of paths."""


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid) -> Tensor:
        return nearest(weight, grid).weight()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def put_on_grid(model: nn.Module, settings: GridSettings, *, blocks: Sequence[str]) -> list[str]:
    """Make the linear layers of `blocks` compute so, in place; their paths. Raises ModelError."""
    found = [
        (path, layer)
        for path, layer in model.named_modules()
        if any(path.startswith(f"{each}.") for each in blocks)
        and (type(layer) is nn.Linear or is_transposed(layer))
        and not any(part in path for part in settings.keep)
    ]
    if not found:
        raise ModelError("train.quantise: none of the model's linear layers is left to be rounded")
    for _, layer in found:
        layer.forward = _forward(layer, settings.grid)
    return [path for path, _ in found]


def _forward(layer: nn.Module, grid: Grid) -> Callable[[Tensor], Tensor]:
    module: Any = layer

    def forward(hidden: Tensor) -> Tensor:
        weight = module.weight.t() if is_transposed(layer) else module.weight
        rounded: Tensor = _Rounded.apply(weight, grid)  # type: ignore[no-untyped-call]
        return functional.linear(hidden, rounded, module.bias)

    return forward
