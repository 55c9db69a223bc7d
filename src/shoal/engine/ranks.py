"""Who this rank is among all of an epoch: its replica, its place in it, and whom it meets where."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from shoal.comm.group import Group, ProcessGroup, watched
from shoal.layout import Layout
from shoal.parallel.held import placed_of
from shoal.parallel.mesh import Mesh, build_mesh


@dataclass
class Ranks:
    """`world`: all ranks of the epoch; `replicas`: those at this rank's place, one per replica.

    `cut`: how one replica is cut (replicate 1). `mesh`: the groups inside this replica.
    """

    world: Group
    replicas: Group
    cut: Layout
    mesh: Mesh

    def attach(self, model: nn.Module) -> None:
        """Let what `model` exchanges inside a replica be counted here."""
        exchange = placed_of(model).exchange
        if exchange is not None:
            exchange.traffic = self.world.traffic

    @property
    def num_replicas(self) -> int:
        """Replicas in this epoch."""
        return self.world.size // self.cut.workers

    @property
    def replica(self) -> int:
        """Number of the replica that this rank belongs to."""
        return self.world.rank // self.cut.workers

    @property
    def place(self) -> int:
        """Place inside the replica: ranks at one place hold the same part of the model."""
        return self.world.rank % self.cut.workers

    @property
    def shard(self) -> int:
        """Coordinate along shard, whose ranks read different samples."""
        return self.cut.coordinates(self.place)["shard"]

    @property
    def part(self) -> int:
        """Which of `num_parts` parts of a batch this rank reads."""
        return self.replica * self.cut.shard + self.shard

    @property
    def num_parts(self) -> int:
        """Parts into which batches are divided: replicate x shard."""
        return self.num_replicas * self.cut.shard

    @property
    def counts(self) -> bool:
        """Whether this rank speaks for the samples it reads: the first of those that read them."""
        here = self.cut.coordinates(self.place)
        return not any(here[axis] for axis in ("pipeline", "context", "tensor"))


def whole(world: Group, *, device: torch.device) -> Ranks:
    """Every rank is a replica."""
    return Ranks(world, world, Layout(), Mesh.alone(device))


def meet(world: ProcessGroup, *, layout: Layout, device: torch.device) -> Ranks:
    """The groups of `layout` with as many replicas as this epoch has. Collective.

    Raises PeersLost when a rank goes meanwhile.
    """
    cut = replace(layout, replicate=1)
    if cut.workers == 1:
        return whole(world, device=device)
    now = replace(layout, replicate=world.size // cut.workers)
    mesh = watched(lambda: build_mesh(now, rank=world.rank, device=device))
    replicas = ProcessGroup(mesh.group("replicate"), pulse=world.pulse, alone=now.replicate == 1)
    replicas.traffic = world.traffic
    return Ranks(world, replicas, cut, mesh)
