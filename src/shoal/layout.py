"""Layouts: the degrees of the axes, and the arithmetic between ranks and coordinates. No torch.

Ranks are laid out with the last axis varying fastest: neighbours on `tensor` are neighbours in
rank, so that the axis that talks most stays inside a node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
"""Mesh axes, slowest varying first. `expert` divides shard x context and is no factor."""


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
        for field in fields(self):
            degree = getattr(self, field.name)
            if not isinstance(degree, int) or degree < 1:
                raise ValueError(f"{field.name}: expected an integer of at least 1, got {degree!r}")
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

    def degree(self, axis: str) -> int:
        """Degree of one axis."""
        return int(getattr(self, axis))

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
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.workers):
            here = self.coordinates(rank)
            fixed = tuple(here[axis] for axis in AXES if axis not in axes)
            groups.setdefault(fixed, []).append(rank)
        yield from groups.values()

    def __str__(self) -> str:
        named = [f"{f.name} {getattr(self, f.name)}" for f in fields(self)]
        named = [part for part in named if not part.endswith(" 1")]
        return ", ".join(named) or "one worker"


@dataclass(frozen=True)
class Share:
    """The part of a global batch that one replica computes: samples `start` to `stop`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def split_evenly(count: int, parts: int, index: int, *, grain: int = 1) -> Share:
    """Contiguous part `index` of `count` items in whole grains; sizes differ by one grain at most.

    Raises ValueError when `count` is not a multiple of `grain`.
    """
    if count % grain:
        raise ValueError(f"{count} is not a multiple of the grain {grain}")
    grains = count // grain
    start, stop = grains * index // parts, grains * (index + 1) // parts
    return Share(start * grain, stop * grain)
