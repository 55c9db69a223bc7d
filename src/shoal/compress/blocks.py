"""Goes through a model block by block and compresses its linear layers, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.compress.grid import Coded, Grid, nearest
from shoal.compress.masks import Sparsity, wanda
from shoal.compress.second_order import gptq, sparse_gpt
from shoal.compress.walk import Seen, Walk
from shoal.models.adapter import matrix_of
from shoal.models.anatomy import Anatomy

Say = Callable[[str, float], None]
"""Told what is done, and the share of it."""


@dataclass(frozen=True)
class Rounding:
    """How weights are put on a grid."""

    grid: Grid
    method: str = "nearest"
    """Or `gptq`."""

    @property
    def needs_hessian(self) -> bool:
        """Whether products of inputs are needed."""
        return self.method == "gptq"

    def code(self, weight: Tensor, seen: Seen) -> Coded:
        """weight [O, I], float32."""
        if self.method == "gptq":
            assert seen.hessian is not None, "asked for"
            return gptq(weight, seen.hessian, self.grid)
        return nearest(weight, self.grid)


@dataclass(frozen=True)
class Pruning:
    """How weights become zeros."""

    sparsity: Sparsity
    method: str
    """`wanda` or `sparsegpt`."""

    @property
    def needs_hessian(self) -> bool:
        """Whether products of inputs are needed."""
        return self.method == "sparsegpt"

    def prune(self, weight: Tensor, seen: Seen) -> Tensor:
        """weight [O, I], float32."""
        if self.method == "sparsegpt":
            assert seen.hessian is not None, "asked for"
            return sparse_gpt(weight, seen.hessian, self.sparsity)
        return wanda(weight, seen.squares, self.sparsity)


@torch.no_grad()
def compress_blocks(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Tensor],
    how: Rounding | Pruning,
    *,
    keep: Sequence[str] = (),
    say: Say = lambda text, share: None,
) -> dict[str, Coded]:
    """Compress the linear layers inside the blocks of `model`, in place; what was put on a grid.

    `batches`: token ids [n, T] of calibration, all of one shape. `keep`: parts of paths of layers
    that stay as they are. Each block sees what the compressed blocks before it give.
    """
    walk = Walk.begin(model, anatomy, batches)
    coded: dict[str, Coded] = {}
    for number, name in enumerate(walk.blocks):
        say("compressing blocks", number / len(walk.blocks))
        seen = walk.watch(name, hessian=how.needs_hessian)
        for path, each in seen.items():
            if any(part in path for part in keep):
                continue
            matrix = matrix_of(model.get_submodule(path))
            if isinstance(how, Rounding):
                coded[path] = how.code(matrix.float(), each)
                matrix.copy_(coded[path].weight())
            else:
                matrix.copy_(how.prune(matrix.float(), each))
        walk.step(name)
    say("compressing blocks", 1.0)
    return coded
