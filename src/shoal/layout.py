"""Layouts: the degrees of the axes, and the arithmetic between ranks and coordinates. No torch.

Replicate varies slowest, so that the ranks of replica r are the block r*k .. (r+1)*k-1: membership,
repair and saves go by replica. Tensor varies fastest: the axis that talks most stays inside a node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import prod

AXES = ("replicate", "pipeline", "shard", "context", "tensor")
"""Mesh axes, slowest varying first. `expert` divides shard x context and is no factor."""

EXPERT_AXES = ("expert_shard", "expert")
"""The ranks of shard x context counted in another way: neighbours share the experts."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of the axes. workers = replicate x shard x context x tensor x pipeline."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name, degree in vars(self).items():
            if not isinstance(degree, int) or degree < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {degree!r}")
        if (self.shard * self.context) % self.expert:
            raise ValueError(
                f"expert: {self.expert} does not divide shard x context = "
                f"{self.shard * self.context}"
            )

    @property
    def workers(self) -> int:
        """Number of workers."""
        return prod(self.degree(axis) for axis in AXES)

    @property
    def replica_workers(self) -> int:
        """Number of workers that hold one replica together."""
        return self.workers // self.replicate

    @property
    def of_one_replica(self) -> Layout:
        """The layout inside a replica: this one with replicate 1."""
        return replace(self, replicate=1)

    def replica_of(self, rank: int) -> int:
        """Number of the replica that `rank` belongs to."""
        return rank // self.replica_workers

    def replica_rank(self, rank: int) -> int:
        """Position of `rank` in its replica, from 0; ranks at one position hold the same part."""
        return rank % self.replica_workers

    def replica_ranks(self, replica: int) -> range:
        """The ranks of one replica: a block of neighbours."""
        return range(replica * self.replica_workers, (replica + 1) * self.replica_workers)

    def peers(self, replica_rank: int) -> range:
        """The ranks at one position, one of each replica."""
        return range(replica_rank, self.workers, self.replica_workers)

    def with_workers(self, workers: int) -> Layout:
        """As many replicas as `workers` make, each cut as here. Raises ValueError for a rest."""
        replicas, rest = divmod(workers, self.replica_workers)
        if rest:
            raise ValueError(f"{workers} workers are no whole replicas of {self.replica_workers}")
        return replace(self, replicate=replicas)

    @property
    def expert_shard(self) -> int:
        """Number of ranks that have the same experts: shard x context / expert."""
        return self.shard * self.context // self.expert

    def degree(self, axis: str) -> int:
        """Degree of one axis."""
        return int(getattr(self, axis))

    def coordinate(self, axis: str, rank: int) -> int:
        """Coordinate of `rank` on one axis, those of the experts among them."""
        here = self.coordinates(rank)
        if axis not in EXPERT_AXES:
            return here[axis]
        place = here["shard"] * self.context + here["context"]
        return place % self.expert if axis == "expert" else place // self.expert

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of `rank` on each axis; the inverse of `rank_of`."""
        if not 0 <= rank < self.workers:
            raise ValueError(f"rank {rank} is outside 0..{self.workers - 1}")
        result: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, result[axis] = divmod(rank, self.degree(axis))
        return {axis: result[axis] for axis in AXES}

    def rank_of(self, coordinates: dict[str, int]) -> int:
        """Rank at `coordinates` (an absent axis is 0)."""
        rank = 0
        for axis in AXES:
            coordinate, degree = coordinates.get(axis, 0), self.degree(axis)
            if not 0 <= coordinate < degree:
                raise ValueError(f"{axis} coordinate {coordinate} is outside 0..{degree - 1}")
            rank = rank * degree + coordinate
        return rank

    def groups(self, *axes: str) -> Iterator[list[int]]:
        """Each set of ranks that differ only on `axes`, in rank order; every rank once."""
        known: tuple[str, ...] = AXES
        if set(axes) & set(EXPERT_AXES):
            known = (*(axis for axis in AXES if axis not in ("shard", "context")), *EXPERT_AXES)
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.workers):
            fixed = tuple(self.coordinate(axis, rank) for axis in known if axis not in axes)
            groups.setdefault(fixed, []).append(rank)
        yield from groups.values()

    def __str__(self) -> str:
        named = [f"{f.name} {getattr(self, f.name)}" for f in fields(self)]
        named = [part for part in named if not part.endswith(" 1")]
        return ", ".join(named) or "one worker"


def host_of_rank(layout: Layout, rank: int, *, num_hosts: int) -> int:
    """Number of the host that `rank` runs on: neighbours together, as evenly as they can be.

    Whole replicas where there is one for each host, else whole stages, else ranks.
    """
    count, size = layout.replicate, layout.replica_workers
    if count < num_hosts:
        count, size = count * layout.pipeline, size // layout.pipeline
    if count < num_hosts:
        count, size = layout.workers, 1
    return rank // size * num_hosts // count


def workers_of_hosts(layout: Layout, *, num_hosts: int) -> list[int]:
    """How many workers each host has."""
    places = [host_of_rank(layout, rank, num_hosts=num_hosts) for rank in range(layout.workers)]
    return [places.count(host) for host in range(num_hosts)]


@dataclass(frozen=True)
class Share:
    """The part of a global batch that one replica computes: samples `start` to `stop`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def split_evenly(count: int, parts: int, index: int, *, multiple: int = 1) -> Share:
    """Contiguous part `index` of `count` items in multiples of `multiple`, as even as they can be.

    Raises ValueError when `count` is not such a multiple.
    """
    if count % multiple:
        raise ValueError(f"{count} is not a multiple of {multiple}")
    units = count // multiple
    start, stop = units * index // parts, units * (index + 1) // parts
    return Share(start * multiple, stop * multiple)
