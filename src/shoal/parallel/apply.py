"""Cuts a replica: the strategies in their one order.

1. tensor     parameters become this rank's parts; exchanges sit at the borders of regions
2. compile    of each block's forward, up to its exchanges
3. recompute  around that, so that it repeats the exchanges inside the block. Compiled blocks
              recompute what is cheap by themselves (their partitioner keeps the fewest bytes), so
              `selective` adds nothing to them
4. shard      last: it divides the rows of what the tensor axis left, and gathers around all this
5. then parallel/materialise.py gives every rank the values of its own boxes
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from shoal.models.anatomy import Anatomy
from shoal.parallel.compile import apply_compile
from shoal.parallel.held import mark
from shoal.parallel.mesh import Mesh
from shoal.parallel.recompute import apply_recompute
from shoal.parallel.shard import apply_shard
from shoal.parallel.tensor import apply_tensor


@dataclass(frozen=True)
class Settings:
    """How the strategies behave, beside the degrees of the layout."""

    shard_level: str = "parameters"
    recompute: str = "none"
    compile: bool = False
    offload: bool = False
    """Parameters, gradients and optimizer state live in CPU memory (with shard above 1)."""


def apply(model: nn.Module, anatomy: Anatomy, mesh: Mesh, settings: Settings) -> None:
    """Cut `model` in place for this rank of `mesh`; a layout of one worker only marks it.

    `model`: on the meta device, or real. Afterwards `held.held` tells what this rank has.
    """
    placed = apply_tensor(model, anatomy, mesh)
    mark(model, placed)
    if settings.compile:
        apply_compile(model, anatomy)
    covered = settings.compile and settings.recompute == "selective"
    apply_recompute(model, anatomy, kind="none" if covered else settings.recompute)
    apply_shard(model, anatomy, placed, level=settings.shard_level, offload=settings.offload)
