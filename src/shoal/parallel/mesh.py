"""The groups of one layout: who shares an axis, a replica or a batch with this rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shoal.comm.group import Traffic
from shoal.layout import AXES, EXPERT_AXES, Layout
from shoal.runtime import new_group

REPLICA = tuple(axis for axis in AXES if axis != "replicate")
"""Axes that one replica is cut along."""


@dataclass
class Mesh:
    """This rank's coordinates in a layout, and its process groups by axes, made on first use."""

    layout: Layout
    rank: int
    device: torch.device
    traffic: Traffic = field(default_factory=Traffic)
    """What its ranks send one another beside what an `Exchange` counts."""
    _groups: dict[tuple[int, ...], dist.ProcessGroup | None] = field(default_factory=dict)

    @classmethod
    def alone(cls, device: torch.device) -> Mesh:
        """The mesh of a replica that is one worker; its replicas are no matter of the mesh."""
        return cls(Layout(), 0, device)

    def degree(self, axis: str) -> int:
        """Number of ranks along `axis`."""
        return self.layout.degree(axis)

    def coordinate(self, axis: str) -> int:
        """This rank's coordinate along `axis`."""
        return self.layout.coordinate(axis, self.rank)

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along `axes` only; None where it is alone.

        The first call for a set of axes is collective over all ranks of the layout, which make
        every such group in one order.
        """
        if all(self.degree(axis) == 1 for axis in axes):
            return None
        found = None
        for ranks in self.layout.groups(*axes):
            if tuple(ranks) not in self._groups:
                self._groups[tuple(ranks)] = new_group(ranks)
            if self.rank in ranks:
                found = self._groups[tuple(ranks)]
        return found

    def ends(self) -> dist.ProcessGroup | None:
        """The first and the last rank along pipeline; None in between. The first call is collective
        over all ranks of the layout."""
        last = self.degree("pipeline") - 1
        if last < 2:
            return self.group("pipeline")
        found = None
        for line in self.layout.groups("pipeline"):
            ranks = (line[0], line[-1])
            if ranks not in self._groups:
                self._groups[ranks] = new_group(list(ranks))
            if self.rank in ranks:
                found = self._groups[ranks]
        return found

    def along(self, *axes: str) -> DeviceMesh:
        """The ranks that differ along `axes` only as torch's one-dimensional mesh."""
        group, name = self.group(*axes), "_".join(axes)
        assert group is not None, f"{name}: this rank is alone on it"
        return DeviceMesh.from_group(group, self.device.type, mesh_dim_names=(name,))


def build_mesh(layout: Layout, *, rank: int, device: torch.device) -> Mesh:
    """The mesh of `layout`. Collective: every worker calls it with the same layout.

    The groups that every run needs are made now, while a rank that is gone can still be told apart.
    Raises ValueError when the degrees do not multiply to the number of workers that have met.
    """
    met = dist.get_world_size() if dist.is_initialized() else 1
    if layout.workers != met:
        raise ValueError(f"the degrees ({layout}) multiply to {layout.workers}, but {met} met")
    mesh = Mesh(layout, rank, device)
    spread = EXPERT_AXES if layout.expert > 1 else ()
    for axes in (*((axis,) for axis in (*AXES, *spread)), REPLICA):
        mesh.group(*axes)
    return mesh
