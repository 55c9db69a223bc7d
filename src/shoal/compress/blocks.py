"""Goes through a model block by block and compresses its linear layers, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.compress.awq import fold_block
from shoal.compress.masks import Sparsity, wanda
from shoal.compress.second_order import gptq, sparse_gpt
from shoal.compress.walk import Seen, Walk, matrices_of, refuse_others
from shoal.compress.workers import Workers
from shoal.models.anatomy import Anatomy
from shoal.models.grid import Coded, Grid, nearest

Say = Callable[[str, float], None]
"""Told what is done, and the share of it."""


@dataclass(frozen=True)
class Rounding:
    """How weights are put on a grid."""

    grid: Grid
    method: str = "nearest"
    """`nearest`, `gptq`, or `awq`: the nearest after inputs were scaled."""

    @property
    def needs_hessian(self) -> bool:
        """Whether products of inputs are needed."""
        return self.method != "nearest"

    def code(self, weight: Tensor, seen: Seen | None = None) -> Coded:
        """weight [O, I], float32."""
        if self.method == "gptq":
            assert seen is not None and seen.hessian is not None, "asked for"
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
        squares = seen.squares if seen.count else torch.ones_like(seen.squares)
        return wanda(weight, squares, self.sparsity)  # an expert nobody asked: by size alone


@torch.no_grad()
def compress_blocks(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Tensor],
    how: Rounding | Pruning,
    *,
    workers: Workers,
    keep: Sequence[str] = (),
    say: Say = lambda text, share: None,
) -> dict[str, Coded]:
    """Compress the matrices inside the blocks of `model`, in place; what was put on a grid.

    `batches`: token ids [n, T] of calibration, all of one shape. `keep`: parts of paths of layers
    that stay as they are. Each block sees what the compressed blocks before it give. `workers`
    share the batches, then the layers of a block.
    """
    refuse_others(anatomy)
    matrices = matrices_of(model.get_submodule(anatomy.blocks), inside=anatomy.blocks)
    chosen = {
        path: each for path, each in matrices.items() if not any(part in path for part in keep)
    }
    if isinstance(how, Rounding) and not how.needs_hessian:
        return _coded(chosen, how, dict.fromkeys(chosen), workers)
    walk = Walk.begin(model, anatomy, batches, workers)
    coded: dict[str, Coded] = {}
    for number, name in enumerate(walk.blocks):
        say("compressing blocks", number / len(walk.blocks))
        every = walk.watch(name, hessian=how.needs_hessian)
        seen = {path: each for path, each in every.items() if path in chosen}
        if isinstance(how, Rounding):
            if how.method == "awq":
                fold_block(model, walk, name, seen, how.grid, rounded=list(seen))
            coded |= _coded(chosen, how, seen, workers)
        else:
            made = workers.map(_pruner(chosen, how), seen.items())
            for path, weight in zip(seen, made, strict=True):
                chosen[path].copy_(weight)
        walk.step(name)
    say("compressing blocks", 1.0)
    return coded


def _pruner(matrices: Mapping[str, Tensor], how: Pruning) -> Callable[[tuple[str, Seen]], Tensor]:
    def prune(item: tuple[str, Seen]) -> Tensor:
        path, seen = item
        return how.prune(matrices[path].float(), seen)

    return prune


def _coded(
    matrices: Mapping[str, Tensor],
    how: Rounding,
    seen: Mapping[str, Seen | None],
    workers: Workers,
) -> dict[str, Coded]:
    """Round matrices, in place."""
    made = workers.map(lambda item: how.code(matrices[item[0]].float(), item[1]), seen.items())
    coded = dict(zip(seen, made, strict=True))
    for path, each in coded.items():
        matrices[path].copy_(each.weight())
    return coded
