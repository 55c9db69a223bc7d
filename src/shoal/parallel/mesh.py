"""The groups of one layout: who shares an axis, a replica or a batch with this rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shoal.layout import AXES, Layout
from shoal.runtime import new_group

REPLICA = tuple(axis for axis in AXES if axis != "replicate")
"""Axes that one replica is cut along."""
BATCH = ("replicate", "shard")
"""Axes whose ranks read different samples."""


@dataclass(frozen=True)
class Mesh:
    """This rank's place in a layout, and its process groups by axes (None where it is alone)."""

    layout: Layout
    rank: int
    device: torch.device
    groups: Mapping[tuple[str, ...], dist.ProcessGroup | None]

    @classmethod
    def alone(cls, device: torch.device) -> Mesh:
        """The mesh of a replica that is one worker; its replicas are no matter of the mesh."""
        axes = (*((axis,) for axis in AXES), REPLICA, BATCH)
        return cls(Layout(), 0, device, dict.fromkeys(axes))

    def degree(self, axis: str) -> int:
        """Number of ranks along `axis`."""
        return self.layout.degree(axis)

    def coordinate(self, axis: str) -> int:
        """This rank's place along `axis`."""
        return self.layout.coordinates(self.rank)[axis]

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The group along one axis, or along `REPLICA` or `BATCH`; None where it is this rank."""
        return self.groups[axes]

    def along(self, axis: str) -> DeviceMesh:
        """The ranks along one axis as torch's one-dimensional mesh."""
        group = self.group(axis)
        assert group is not None, f"{axis}: this rank is alone on it"
        return DeviceMesh.from_group(group, self.device.type, mesh_dim_names=(axis,))


def build_mesh(layout: Layout, *, rank: int, device: torch.device) -> Mesh:
    """Make the groups of `layout`. Collective: every worker calls it with the same layout.

    Raises ValueError when the degrees do not multiply to the number of workers that have met.
    """
    met = dist.get_world_size() if dist.is_initialized() else 1
    if layout.workers != met:
        raise ValueError(f"the degrees ({layout}) multiply to {layout.workers}, but {met} met")
    groups: dict[tuple[str, ...], dist.ProcessGroup | None] = {}
    known: dict[tuple[int, ...], dist.ProcessGroup | None] = {(rank,): None}
    for axes in (*((axis,) for axis in AXES), REPLICA, BATCH):
        mine = None
        for ranks in layout.groups(*axes):
            # every rank takes part in making every group, in one order
            if tuple(ranks) not in known:
                known[tuple(ranks)] = new_group(ranks) if len(ranks) > 1 else None
            if rank in ranks:
                mine = known[tuple(ranks)]
        groups[axes] = mine
    return Mesh(layout, rank, device, groups)
