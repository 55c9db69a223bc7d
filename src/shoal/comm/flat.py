"""Flat buffers: where each named tensor lies in one long vector, and how ranks divide it.

Regions (such as "with decay", "without", "frozen") follow one another, each padded to whole
chunks. Slices that ranks own begin at chunk borders, and norms are taken chunk by chunk and added
in order: so neither the number of ranks nor who owns what changes a bit of an element-wise update
or of a norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from shoal.comm.group import Group

CHUNK = 16384
"""Elements per chunk: 64 KiB of float32, small against a model, large against call overhead."""
_ALIGN = 16
"""Elements: tensors begin at 64-byte borders, as if they had been allocated alone."""


@dataclass(frozen=True)
class Span:
    """Elements `start` to `stop` of the vector."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def meet(self, other: Span) -> Span | None:
        """The common part, or None."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Span(start, stop) if start < stop else None


@dataclass(frozen=True)
class FlatLayout:
    """Offsets of named shapes in one vector of `numel` elements, region after region."""

    shapes: dict[str, tuple[int, ...]]
    offsets: dict[str, int]
    regions: dict[str, Span]
    members: dict[str, tuple[str, ...]]
    numel: int
    whole: frozenset[str] = frozenset()
    """Regions whose tensors are never cut between ranks (matrices that are updated as such)."""

    @classmethod
    def of(
        cls, regions: Mapping[str, Mapping[str, Sequence[int]]], *, whole: Iterable[str] = ()
    ) -> FlatLayout:
        """Lay out `regions` (region -> name -> shape) in the order given."""
        uncut = frozenset(whole)
        shapes: dict[str, tuple[int, ...]] = {}
        offsets: dict[str, int] = {}
        spans: dict[str, Span] = {}
        at = 0
        for region, named in regions.items():
            began = at
            for name, shape in named.items():
                if name in shapes:
                    raise ValueError(f"{name} is given twice")
                shapes[name], offsets[name] = tuple(shape), at
                at = _up(at + prod(shape), CHUNK if region in uncut else _ALIGN)
            at = _up(at, CHUNK)
            spans[region] = Span(began, at)
        members = {region: tuple(named) for region, named in regions.items()}
        return cls(shapes, offsets, spans, members, at, uncut)

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The tensor `name` inside `flat`, shaped; shares its memory."""
        start, shape = self.offsets[name], self.shapes[name]
        return flat[start : start + prod(shape)].view(shape)

    def divide(self, size: int, *, numel: int | None = None) -> list[Span]:
        """The vector (or its first `numel` elements) in `size` spans of whole chunks.

        Every element is in exactly one span; tensors of `whole` regions are not cut. Spans may be
        empty when there are fewer chunks than ranks.
        """
        total = self.numel if numel is None else numel
        edges = [0]
        for rank in range(1, size):
            cut = total // CHUNK * rank // size * CHUNK
            edges.append(max(edges[-1], self._border(cut)))
        edges.append(total)
        return [Span(start, stop) for start, stop in itertools.pairwise(edges)]

    def _border(self, cut: int) -> int:
        """`cut`, or the nearer end of the tensor that must not be cut there."""
        for region in self.whole:
            span = self.regions[region]
            if not span.start < cut < span.stop:
                continue
            for name in self.members[region]:
                start = self.offsets[name]
                stop = _up(start + prod(self.shapes[name]), CHUNK)
                if start < cut < stop:
                    return start if cut - start <= stop - cut else stop
        return cut


@dataclass
class Vector:
    """One flat tensor laid out as the parameters are, and how replicas share it."""

    kind: str
    """`parameter`, or a state by name: `exp_avg`, `outer/momentum`, ..."""
    tensor: Tensor
    regions: frozenset[str]
    """The regions whose parameters have it."""
    equal: bool = True
    """The same on all replicas when their parameters are: hashed, repaired, saved once."""
    steady: bool = False
    """Also in between, while replicas step by themselves."""
    sums: bool = False
    """Differs, and only the sum matters: in another number of replicas each gets its part of it."""
    optional: bool = False
    """A checkpoint may lack it, as one of another policy does: it is zero then."""

    def must_equal(self, *, steady: bool) -> bool:
        """Whether all replicas must have the same; `steady`: while they step by themselves."""
        return self.equal and (self.steady or not steady)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def chunk_squares(flat: Tensor) -> Tensor:
    """Sum of squares of each chunk of `flat` [n x CHUNK] -> float64 [n].

    A chunk's figure depends on that chunk only, so parts computed by different ranks can be put
    together and added in one order.
    """
    norms: Tensor = torch.linalg.vector_norm(flat.view(-1, CHUNK), dim=1)
    return norms.double().square_()


def ordered_sum(values: Iterable[float]) -> float:
    """Sum in the order given, in double precision."""
    total = 0.0
    for value in values:
        total += value
    return total


def sum_rows(
    parts: Sequence[Mapping[str, Tensor]], *, group: Group, count: int, start: int | None
) -> dict[str, Tensor]:
    """Rows that ranks have in `parts`, as [count, ...] on every rank, in CPU memory.

    They are those from `start` on; None: another rank has the same. What nobody has is 0.
    """
    whole = {}
    for name, first in parts[0].items():
        rows = torch.cat([part[name] for part in parts]).cpu()
        whole[name] = rows.new_zeros(count, *first.shape[1:])
        if start is not None:
            whole[name][start : start + len(rows)] = rows
        group.sum_(whole[name])
    return whole
