"""What this rank has of every parameter: one record each, made by the strategies, read by everyone.

Checkpoints, optimizer state, norms and hashes work on boxes and on plain local tensors. How a
replica is cut (tensor and expert leave segments of a dim, shard leaves rows of those) is known here
only, and to nobody by the name of an axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shoal.boxes import Box, Slot
from shoal.comm.flat import CHUNK, chunk_squares
from shoal.parallel.exchange import Exchange
from shoal.parallel.mesh import REPLICA, Mesh
from shoal.parallel.rows import Context
from shoal.parallel.stages import Stages
from shoal.parallel.vocabulary import Vocabulary
from shoal.runtime import complete

_MARK = "shoal_sharded"

_BUCKET_BYTES = 64 * 2**20
"""Of gradients that are summed as one message, and copied for it."""


@dataclass(frozen=True)
class Segment:
    """Elements `start` to `start + size` of dim `dim` of the whole parameter."""

    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class Holding:
    """What this rank has of one parameter, who has the same, and over whom its gradient is a sum.

    A fused projection of 3 x 4 rows cut over two ranks: the second has segments (0, 2, 2),
    (0, 6, 2), (0, 10, 2), which lie one after another in its local tensor of 6 rows; sharded over
    two more, the first of those has `rows` (0, 3): rows 2, 3 and 6 of the whole.
    """

    shape: tuple[int, ...]
    """Of the whole parameter."""
    segments: tuple[Segment, ...] = ()
    """What tensor and expert left, in the order they lie here; a dim without any is whole."""
    rows: tuple[int, int] | None = None
    """What shard left: first and number of rows (dim 0) of the segments; None: all."""
    copies: frozenset[str] = frozenset()
    """Axes of the replica whose ranks hold the same elements."""
    partial: frozenset[str] = frozenset()
    """Axes over which its gradient is still to be summed after the last backward."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def slots(self) -> list[Slot]:
        """The boxes that this rank has, and where they lie in its storage; they do not overlap."""
        runs = [self._runs(dim) for dim in range(len(self.shape))]
        return [
            Slot(
                Box(tuple(run[0] for run in chosen), tuple(run[2] for run in chosen)),
                tuple(run[1] for run in chosen),
            )
            for chosen in itertools.product(*runs)
        ]

    def _runs(self, dim: int) -> list[tuple[int, int, int]]:
        """Along `dim`: (start in the whole, start here, size) of each unbroken run."""
        own = [each for each in self.segments if each.dim == dim]
        own = own or [Segment(dim, 0, self.shape[dim])]
        low, high = 0, sum(each.size for each in own)
        if dim == 0 and self.rows is not None:
            low, high = self.rows[0], self.rows[0] + self.rows[1]
        found, at = [], 0
        for each in own:
            first, last = max(at, low), min(at + each.size, high)
            if last > first:
                found.append((each.start + first - at, first - low, last - first))
            at += each.size
        return found


class Holdings(Mapping[str, Holding]):
    """The records of one rank by canonical name, and what follows from them."""

    def __init__(self, mesh: Mesh, holdings: Mapping[str, Holding]) -> None:
        self.mesh, self._holdings = mesh, dict(holdings)

    @classmethod
    def whole(cls, mesh: Mesh, shapes: Mapping[str, Sequence[int]]) -> Holdings:
        """Every parameter whole, as before any strategy."""
        return cls(mesh, {name: Holding(tuple(shape)) for name, shape in shapes.items()})

    def __getitem__(self, name: str) -> Holding:
        return self._holdings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._holdings)

    def __len__(self) -> int:
        return len(self._holdings)

    def changed(self, changes: Mapping[str, Mapping[str, Any]]) -> Holdings:
        """The same with other values of some fields of some records: name -> field -> value."""
        changed = {n: replace(self._holdings[n], **fields) for n, fields in changes.items()}
        return Holdings(self.mesh, {**self._holdings, **changed})

    def only(self, names: Collection[str]) -> Holdings:
        """Those of `names`: what this rank has nothing of has no record."""
        return Holdings(self.mesh, {n: each for n, each in self.items() if n in names})

    def counts(self, name: str) -> bool:
        """Whether this rank speaks for its part of `name` in a sum over the replica."""
        return not any(self.mesh.coordinate(axis) for axis in self[name].copies)

    def owners(self, *, replicas: int) -> dict[str, tuple[int, ...]]:
        """Who saves this rank's part of each name: (replica, coordinate along each spread axis).

        Compare with `here(replica)`; a name without an owner is saved by another stage. Those that
        have the same part come to one answer without asking; bytes are spread over copies and
        replicas, the fullest gets nothing.
        """
        axes = self._spread_axes()
        cells = itertools.product(range(replicas), *(range(self.mesh.degree(a)) for a in axes))
        loads = dict.fromkeys(cells, 0)
        found = {}
        for name, holding in self.items():
            fixed = [axis for axis in axes if axis not in holding.copies]
            ours = tuple(self.mesh.coordinate(axis) for axis in fixed)
            parts = list(itertools.product(*(range(self.mesh.degree(a)) for a in fixed)))
            for part in parts:  # those at other coordinates have parts and loads of their own
                able = [cell for cell in loads if self._at(cell, axes, fixed) == part]
                owner = min(able, key=loads.__getitem__)
                loads[owner] += holding.numel // len(parts)
                if part == ours and self._first_stage_with(holding):
                    found[name] = owner
        return found

    def _first_stage_with(self, holding: Holding) -> bool:
        """Of stages that have the same, the first speaks: none knows what else the others have."""
        return "pipeline" not in holding.copies or not self.mesh.coordinate("pipeline")

    def here(self, replica: int) -> tuple[int, ...]:
        """This rank as `owners` names it, as a member of `replica`."""
        return (replica, *(self.mesh.coordinate(axis) for axis in self._spread_axes()))

    def _spread_axes(self) -> list[str]:
        known = frozenset[str]().union(*(each.copies for each in self.values()))
        return sorted(known - {"pipeline"})

    @staticmethod
    def _at(cell: tuple[int, ...], axes: list[str], fixed: list[str]) -> tuple[int, ...]:
        return tuple(cell[1 + axes.index(axis)] for axis in fixed)

    @torch.no_grad()
    def sum_partial(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum the gradients of which each rank has a part: flat sums per set of axes.

        Once a step, after the last backward. Collective along those axes; without any, nothing.
        What is tied between the ends of a pipeline is summed over them last.
        """
        inside: dict[frozenset[str], list[Tensor]] = {}
        tied = []
        for name, holding in self.items():
            if not holding.partial or name not in gradients:
                continue
            inside.setdefault(holding.partial - {"pipeline"}, []).append(gradients[name])
            if "pipeline" in holding.partial:
                tied.append(gradients[name])
        for axes in sorted(inside, key=sorted):
            self._sum_over(self.mesh.group(*axes), inside[axes])
        if tied:
            self._sum_over(self.mesh.ends(), tied)

    def _sum_over(self, group: dist.ProcessGroup | None, tensors: list[Tensor]) -> None:
        """Sum each over a group, in messages of a bucket; nothing where this rank is alone."""
        if group is None:
            return
        exchange = Exchange(group, dist.get_rank(group), dist.get_world_size(group))
        exchange.traffic = self.mesh.traffic
        for bucket in _buckets(tensors):
            exchange.sum_(bucket)

    @torch.no_grad()
    def own_square(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Sum of squares of those of `tensors` (local, by name) that this rank speaks for."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for square in _squares(each for name, each in tensors.items() if self.counts(name)):
            total += square
        return total

    @torch.no_grad()
    def norm(self, tensors: Mapping[str, Tensor]) -> float:
        """Euclidean norm over every element of the replica once, of which each rank has its part.

        Collective over the ranks of the replica, all of which get the same number.
        """
        total = self.own_square(tensors)
        group = self.mesh.group(*REPLICA)
        if group is not None:
            complete(dist.all_reduce, total, group=group)
        return float(total.sqrt())


@dataclass
class ShardedModel:
    """How `parallel.apply` cut a model; the model carries it."""

    mesh: Mesh
    holdings: Holdings
    exchange: Exchange | None = None
    """What the tensor axis moves hidden states with."""
    context: Context | None = None
    """The part of each row that this rank has; None: whole rows."""
    expert: Exchange | None = None
    """What the expert axis moves rows with."""
    vocabulary: Vocabulary | None = None
    """The part of the vocabulary whose logits this rank has; None: all."""
    root: nn.Module | None = field(default=None, repr=False)
    """What FSDP2 calls its root (parallel/shard.py)."""
    stages: Stages | None = None
    """Of a pipeline, those that this rank has; None: the model is one (parallel/stages.py)."""
    offloaded: bool = False
    """Parameters, gradients and optimizer state live in CPU memory."""

    @property
    def storage_device(self) -> torch.device:
        """Where parameters are stored."""
        return torch.device("cpu") if self.offloaded else self.mesh.device


def mark(model: nn.Module, sharded: ShardedModel) -> None:
    """Let the model carry how it was cut."""
    object.__setattr__(model, _MARK, sharded)


def sharded_of(model: nn.Module) -> ShardedModel:
    """How `model` was cut. Raises ValueError for one that `parallel.apply` has not seen."""
    sharded = getattr(model, _MARK, None)
    if not isinstance(sharded, ShardedModel):
        raise ValueError(f"{type(model).__name__}: parallel.apply has not seen this model")
    return sharded


def local(tensor: Tensor) -> Tensor:
    """The plain tensor on this rank behind a parameter or gradient."""
    whole = tensor.detach()
    return whole.to_local() if isinstance(whole, DTensor) else whole


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """In their order, so many together as one message should have."""
    bucket: list[Tensor] = []
    for each in tensors:
        if bucket and sum(kept.nbytes for kept in bucket) + each.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(each)
    yield bucket


def _squares(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for each in tensors:
        if each.numel():
            yield squares_of(each).sum()


def squares_of(tensor: Tensor) -> Tensor:
    """Sums of squares over parts of `tensor`, float64: float32 adds up too few digits over all."""
    flat = tensor.reshape(-1)
    even = len(flat) // CHUNK * CHUNK
    rest = torch.linalg.vector_norm(flat[even:]).double().square()
    return torch.cat([chunk_squares(flat[:even]), rest[None]])
