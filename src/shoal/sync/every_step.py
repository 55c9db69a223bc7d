"""Policy every-step: the gradients of all replicas are summed at every step.

Owns the replicate axis: which part of the global batch a replica computes, how gradients are
added (DESIGN 2), and which part of the summed vector this rank must apply. Processes each apply
the whole; threads, who share parameters, each apply a slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.comm.flat import CHUNK, FlatLayout, Span
from shoal.comm.group import Group
from shoal.comm.tree import Node, TreeSum, node_places
from shoal.layout import Share, split_evenly


@dataclass(frozen=True)
class Reduced:
    """The part `span` of the summed gradient: `values` holds these elements only."""

    span: Span
    values: Tensor


class EveryStep:
    """Synchronous agreement over `group`: one rank of each replica, all at one place in it.

    `shard` of `shards`: which part of its replica's samples this rank computes.
    """

    def __init__(
        self,
        group: Group,
        *,
        global_batch_samples: int,
        grain_samples: int,
        bucket_bytes: int,
        shard: int = 0,
        shards: int = 1,
    ) -> None:
        self.group = group
        self._shard, self._shards = shard, shards
        self._batch, self._grain = global_batch_samples, grain_samples
        self._bucket_bytes = bucket_bytes
        self._scratch: Tensor | None = None

    def before_step(self, step: int) -> None:
        """Nothing is pending between steps under this policy."""

    def after_step(self, step: int) -> None:
        """Let nobody read parameters before all slices are applied."""
        if self.group.computes_in_place:
            self.group.barrier()

    def share(self) -> Share:
        """This rank's part of every global batch, in whole grains; equal for all shards."""
        mine = self._share(self.group.rank)
        part = split_evenly(len(mine), self._shards, self._shard, grain=self._grain)
        return Share(mine.start + part.start, mine.start + part.stop)

    def _share(self, rank: int) -> Share:
        grain = self._grain * self._shards
        return split_evenly(self._batch, self.group.size, rank, grain=grain)

    def owned(self, layout: FlatLayout, *, numel: int) -> Span:
        """The part of the first `numel` elements that this rank updates."""
        if self.group.computes_in_place:
            return layout.divide(self.group.size, numel=numel)[self.group.rank]
        return Span(0, numel)

    def reduce(self, gradient: Tensor, layout: FlatLayout) -> Reduced:
        """SUM of all ranks' flat `gradient` (which is overwritten where that saves a copy)."""
        group = self.group
        if group.size == 1:
            return Reduced(Span(0, gradient.numel()), gradient)
        if not group.computes_in_place:
            group.barrier()  # so that waiting for a slow rank is told apart from communication
            for part in gradient.split(max(CHUNK, self._bucket_bytes // 4)):
                group.sum_(part)
            return Reduced(Span(0, gradient.numel()), gradient)
        spans = layout.divide(group.size, numel=gradient.numel())
        own = spans[group.rank]
        views = group.slices([gradient], [(span.start, span.stop) for span in spans])
        if self._scratch is None or self._scratch.numel() != len(own):
            self._scratch = torch.empty_like(gradient[own.start : own.stop])
        total = self._scratch
        torch.add(views[0][0], views[1][0], out=total)
        for (other,) in views[2:]:
            total.add_(other)
        # The others' gradients are free again once everybody is here; after_step's and the
        # squares' meetings come before any of them is written.
        return Reduced(own, total)

    def reduce_tree(self, nodes: list[Node], layout: FlatLayout, *, num_grains: int) -> Reduced:
        """Sum the ranks' tree nodes in the one order of DESIGN 5.8; same bits in any division."""
        group = self.group
        numel = nodes[0].value.numel()
        if group.size == 1:
            return Reduced(Span(0, numel), _root(nodes))
        places = [self._places(rank) for rank in range(group.size)]
        most = max(len(theirs) for theirs in places)
        own = [node.value for node in nodes]
        own += [torch.zeros_like(own[0]) for _ in range(most - len(own))]
        spans = layout.divide(group.size, numel=numel)
        bounds = [(span.start, span.stop) for span in spans]
        received = group.slices(own, bounds)
        tree = TreeSum()
        for theirs, values in zip(places, received):
            for (level, index), value in zip(theirs, values):
                tree.push(Node(level, index, value.clone()))
        total = tree.root()
        assert tree.nodes == [] and num_grains > 0, "every node enters the sum"
        span = spans[group.rank]
        if group.computes_in_place:
            return Reduced(span, total)
        whole = own[0]
        whole[span.start : span.stop] = total
        group.assemble_(whole, bounds)
        return Reduced(Span(0, numel), whole)

    def _places(self, rank: int) -> list[tuple[int, int]]:
        share = self._share(rank)
        return node_places(share.start // self._grain, share.stop // self._grain)

    def total_of_chunks(self, squares: Tensor, *, num_chunks: int, first: int) -> Tensor:
        """Put together every rank's chunk figures: float64 [num_chunks], the same on all."""
        if not self.group.computes_in_place:
            return squares
        whole = torch.zeros(num_chunks, dtype=torch.float64)
        whole[first : first + squares.numel()] = squares
        self.group.sum_(whole)  # each element is one number and zeros: exact
        return whole


def _root(nodes: list[Node]) -> Tensor:
    tree = TreeSum()
    for node in nodes:
        tree.push(node)
    return tree.root()
