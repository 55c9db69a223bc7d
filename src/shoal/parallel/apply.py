"""Cuts a replica: the strategies in their one order.

1. pipeline   first: what other stages have goes, so that all else is done to what is left
2. tensor     parameters become this rank's parts; exchanges sit at the borders of regions
3. context    rows become this rank's parts; attention gets a kernel that finds the others
4. expert     each rank keeps its experts of a block; rows go to where theirs are
5. compile    of each block's forward, up to its exchanges
6. recompute  around that, so that it repeats the exchanges inside the block. Compiled blocks
              recompute what is cheap by themselves (their partitioner keeps the fewest bytes), so
              `selective` adds nothing to them
7. shard      last: it divides the rows of what the others left, and gathers around all this
8. then parallel/materialise.py gives every rank the values of its own boxes
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from shoal.models.anatomy import Anatomy, canonical_parameters, ties_of
from shoal.parallel.compile import apply_compile
from shoal.parallel.context import apply_context
from shoal.parallel.expert import apply_expert
from shoal.parallel.local import Holdings, ShardedModel, mark
from shoal.parallel.mesh import Mesh
from shoal.parallel.pipeline import apply_pipeline
from shoal.parallel.recompute import apply_recompute
from shoal.parallel.settings import Settings
from shoal.parallel.shard import apply_shard
from shoal.parallel.tensor import apply_tensor

STRATEGIES = (
    apply_tensor,
    apply_context,
    apply_expert,
    apply_compile,
    apply_recompute,
    apply_shard,
)


def apply(model: nn.Module, anatomy: Anatomy, mesh: Mesh, settings: Settings) -> ShardedModel:
    """Cut `model` in place for this rank of `mesh`; a layout of one worker only marks it.

    `model`: on the meta device, or real. What this rank has afterwards is in its `holdings`.
    Raises ModelError for a family or a degree without a rule.
    """
    shapes = {name: tuple(each.shape) for name, each in canonical_parameters(model).items()}
    sharded = ShardedModel(mesh, Holdings.whole(mesh, shapes))
    mark(model, sharded)
    sharded.holdings = apply_pipeline(model, anatomy, mesh, sharded.holdings, settings)
    left = replace(anatomy, ties=ties_of(model))  # a stage in between has no tied parameters
    for strategy in STRATEGIES:
        sharded.holdings = strategy(model, left, mesh, sharded.holdings, settings)
    return sharded
