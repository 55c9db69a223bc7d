"""Policy every-step: the gradients of all replicas are summed at every step.

Processes each apply the whole sum; threads, who share parameters, each apply a slice. With a codec
the sum crosses compressed, and all get the same bits.

In groups of neighbours (those of one host) each rank sums its part of the group's gradients, and
that part over the groups: between these 2 (G-1)/G x 4 N / k bytes go out of each replica, for G
groups of k. Exact mode gives the bits of no groups; else a group's sum is added up in rank order
before the others', which rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.comm.codec.codec import mixed
from shoal.comm.codec.compression import Compression, Note
from shoal.comm.codec.kinds import create
from shoal.comm.flat import CHUNK, FlatLayout, Span, Vector
from shoal.comm.group import Group
from shoal.comm.tree import Node, TreeSum, node_places
from shoal.config.sync import EveryStep as Section
from shoal.layout import split_evenly
from shoal.sync.policy import Division, Given, Gradients, Policy, Reduced, two_levels


class EveryStep(Policy):
    """Synchronous agreement over `peers`."""

    keeps_equal_state = True

    def __init__(
        self,
        division: Division,
        *,
        bucket_bytes: int,
        compression: Compression | None = None,
        seed: int = 0,
        group_replicas: int | None = None,
    ) -> None:
        """`seed`: of what a codec draws."""
        super().__init__(division)
        self._within = group_replicas
        self._levels: tuple[Group, Group] | None = None
        self._bucket_bytes = bucket_bytes
        self._compression, self._seed, self._step = compression, seed, 0
        self._scratch: Tensor | None = None
        self._begun: list[Callable[[], None]] = []

    def enter(self, *, world: Group, peers: Group, inside: Group) -> None:
        super().enter(world=world, peers=peers, inside=inside)
        self._begun = []  # those of a step that was given up
        in_memory = peers.computes_in_place
        self._levels = None if in_memory else two_levels(peers, self._within, world=world)

    @classmethod
    def of(cls, section: Section, given: Given) -> EveryStep:
        compression = None
        if section.codec.kind != "none":
            compression = create(section.codec, given.layout, like=given.values)
        return cls(
            given.division,
            bucket_bytes=section.bucket_bytes,
            compression=compression,
            seed=given.seed,
            group_replicas=section.group_replicas,
        )

    def before_step(self, step: int) -> None:
        self._step = step

    def after_step(self, step: int, *, targets: int) -> None:
        """Let nobody read parameters before all slices are applied."""
        if self._compression is not None:
            self._compression.commit()
        if self.peers.computes_in_place:
            self.peers.barrier()

    def owned(self, layout: FlatLayout, *, numel: int) -> Span:
        if self.peers.computes_in_place:
            return layout.divide(self.peers.size, numel=numel)[self.peers.rank]
        return Span(0, numel)

    def buckets(self, *, numel: int) -> list[Span]:
        whole = self._compression is not None or self.peers.computes_in_place
        if self.peers.size == 1 or whole or self._levels is not None:
            return []
        return self._parts(numel)

    def _parts(self, numel: int) -> list[Span]:
        """What is summed by one message."""
        size = max(CHUNK, self._bucket_bytes // 4)
        return [Span(start, min(start + size, numel)) for start in range(0, numel, size)]

    def begin_reduce(self, flat: Tensor) -> None:
        self._begun.append(self.peers.begin_sum_(flat))

    def reduce(self, gradients: Gradients) -> Reduced:
        """SUM of all replicas' gradients; of nodes, in the one order of the tree."""
        if gradients.nodes:
            return self._reduce_tree(gradients.nodes, gradients.layout)
        group, flat, layout = self.peers, gradients.flat, gradients.layout
        if group.size == 1:
            return Reduced(Span(0, flat.numel()), flat)
        if self._compression is not None:
            group.barrier()  # as below
            self._compression.sum_(group, flat, key=mixed(self._seed, self._step))
            return Reduced(Span(0, flat.numel()), flat)
        if not group.computes_in_place:
            group.barrier()  # so that waiting for a slow rank is told apart from communication
            begun, self._begun = self._begun, []
            for finish in begun:
                finish()
            for span in () if begun else self._parts(flat.numel()):
                self._sum_(flat[span.start : span.stop])
            return Reduced(Span(0, flat.numel()), flat)
        spans = layout.divide(group.size, numel=flat.numel())
        own = spans[group.rank]
        views = group.slices([flat], [(span.start, span.stop) for span in spans])
        if self._scratch is None or self._scratch.numel() != len(own):
            self._scratch = torch.empty_like(flat[own.start : own.stop])
        total = self._scratch
        torch.add(views[0][0], views[1][0], out=total)
        for (other,) in views[2:]:
            total.add_(other)
        # The others' gradients are free again once everybody is here; after_step's and the
        # squares' meetings come before any of them is written.
        return Reduced(own, total, group)

    def _sum_(self, flat: Tensor) -> None:
        """Replace `flat` by the sum over all replicas."""
        if self._levels is None:
            self.peers.sum_(flat)
            return
        near, far = self._levels
        bounds = _bounds(flat.numel(), near.size)
        first, *others = (part for (part,) in near.slices([flat], bounds))
        total = first.clone()
        for other in others:
            total.add_(other)
        far.sum_(total)
        flat[slice(*bounds[near.rank])] = total
        near.assemble_(flat, bounds)

    def _reduce_tree(self, nodes: list[Node], layout: FlatLayout) -> Reduced:
        """Sum the replicas' tree nodes in one order; the same bits in any division."""
        group = self.peers
        numel = nodes[0].value.numel()
        if group.size == 1:
            return Reduced(Span(0, numel), sum_of(nodes))
        places = [self._leaves(rank) for rank in range(group.size)]
        if self._levels is not None:
            return Reduced(Span(0, numel), self._reduce_groups(nodes, places))
        spans = layout.divide(group.size, numel=numel)
        bounds, whole = [(span.start, span.stop) for span in spans], nodes[0].value
        total = sum_of(_exchanged(group, nodes, places, bounds))
        span = spans[group.rank]
        if group.computes_in_place:
            return Reduced(span, total, group)
        whole[span.start : span.stop] = total
        group.assemble_(whole, bounds)
        return Reduced(Span(0, numel), whole)

    def _reduce_groups(self, nodes: list[Node], places: list[tuple[int, int]]) -> Tensor:
        """As over all: the nodes of a group's leaves are the same whoever has summed them."""
        assert self._levels is not None, "asked for"
        (near, far), whole = self._levels, nodes[0].value
        groups = [places[at : at + near.size] for at in range(0, len(places), near.size)]
        bounds = _bounds(whole.numel(), near.size)
        tree = TreeSum()
        for node in _exchanged(near, nodes, groups[far.rank], bounds):
            tree.push(node)
        part = tree.nodes[0].value
        parts = _bounds(part.numel(), far.size)
        ends = [(group[0][0], group[-1][1]) for group in groups]
        total = sum_of(_exchanged(far, tree.nodes, ends, parts))
        part[slice(*parts[far.rank])] = total
        far.assemble_(part, parts)
        whole[slice(*bounds[near.rank])] = part
        near.assemble_(whole, bounds)
        return whole

    def vectors(self) -> Iterable[Vector]:
        return () if self._compression is None else self._compression.vectors()

    def notes(self) -> list[Note]:
        return [] if self._compression is None else self._compression.notes()

    def facts(self) -> dict[str, Any]:
        return {} if self._compression is None else self._compression.facts()

    def restore(self, facts: Mapping[str, Any]) -> None:
        if self._compression is not None:
            self._compression.restore(facts)

    def _leaves(self, rank: int) -> tuple[int, int]:
        """The micro batches of a replica: from the first to behind the last."""
        share, size = self.shares.share(rank, self._step), self.division.micro_batch_samples
        return share.start // size, share.stop // size


def _bounds(numel: int, parts: int) -> list[tuple[int, int]]:
    shares = [split_evenly(numel, parts, index) for index in range(parts)]
    return [(share.start, share.stop) for share in shares]


def _exchanged(
    group: Group, nodes: list[Node], leaves: list[tuple[int, int]], bounds: list[tuple[int, int]]
) -> Iterator[Node]:
    """This rank's part of the nodes of all, in leaf order: those of each rank's `leaves`."""
    positions = [node_places(*each) for each in leaves]
    most = max(len(theirs) for theirs in positions)
    own = [node.value for node in nodes]
    own += [torch.zeros_like(own[0]) for _ in range(most - len(own))]
    received = group.slices(own, bounds)
    for theirs, values in zip(positions, received):
        for (level, index), value in zip(theirs, values):
            yield Node(level, index, value.clone())


def sum_of(nodes: Iterable[Node]) -> Tensor:
    """The root of the tree over `nodes`, given in leaf order; their values are overwritten."""
    tree = TreeSum()
    for node in nodes:
        tree.push(node)
    return tree.root()
