"""Who this rank is in a generation: its replica, its position there, and whom it meets where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from shoal.comm.group import Group, ProcessGroup, watched
from shoal.layout import Layout, Share, split_evenly
from shoal.parallel.local import sharded_of
from shoal.parallel.mesh import REPLICA, Mesh, build_mesh


@dataclass
class Ranks:
    """The groups of one rank.

    `world`: all ranks of the generation. `peers`: one of each replica, all at this rank's position.
    `inside`: the ranks of this replica. `layout`: of the generation, with as many replicas as it
    has. `mesh`: the groups along the axes.
    """

    world: Group
    peers: Group
    inside: Group
    layout: Layout
    mesh: Mesh
    speaks_at: int = 0
    """Coordinate along pipeline of the rank that has the last stage."""

    def attach(self, model: nn.Module) -> None:
        """Let what `model` exchanges inside a replica be counted here, and its last stage speak."""
        sharded = sharded_of(model)
        if sharded.context is not None:
            sharded.context.exchange.traffic = self.world.traffic
        for exchange in (sharded.exchange, sharded.expert):
            if exchange is not None:
                exchange.traffic = self.world.traffic
        if sharded.stages is not None:
            self.speaks_at = sharded.stages.speaks_at

    @property
    def replica_layout(self) -> Layout:
        """How one replica is cut."""
        return self.layout.of_one_replica

    @property
    def num_replicas(self) -> int:
        """Replicas in this generation."""
        return self.layout.replicate

    @property
    def replica(self) -> int:
        """Number of the replica that this rank belongs to."""
        return self.layout.replica_of(self.world.rank)

    @property
    def replica_rank(self) -> int:
        """Position inside the replica; ranks at one position hold the same part of the model."""
        return self.layout.replica_rank(self.world.rank)

    @property
    def shard(self) -> int:
        """Coordinate along shard, whose ranks read different samples."""
        return self.layout.coordinates(self.world.rank)["shard"]

    @property
    def part(self) -> int:
        """Which of `num_parts` parts of a batch this rank reads."""
        return self.replica * self.layout.shard + self.shard

    @property
    def num_parts(self) -> int:
        """Parts into which batches are divided: replicate x shard."""
        return self.layout.replicate * self.layout.shard

    def share_of(self, share: Share, *, multiple: int) -> Share:
        """What this rank's shard computes of its replica's share, in whole micro batches."""
        part = split_evenly(len(share), self.layout.shard, self.shard, multiple=multiple)
        return Share(share.start + part.start, share.start + part.stop)

    @property
    def reads(self) -> bool:
        """Whether this rank counts the targets of the samples it reads: the first of those that
        read them."""
        here = self.layout.coordinates(self.world.rank)
        return not any(here[axis] for axis in ("pipeline", "context", "tensor"))

    @property
    def speaks(self) -> bool:
        """Whether this rank has the loss of those samples: the first of the last stage's."""
        here = self.layout.coordinates(self.world.rank)
        last = here["pipeline"] == self.speaks_at
        return last and not any(here[axis] for axis in ("context", "tensor"))


def whole(world: Group, *, device: torch.device) -> Ranks:
    """Every rank is a replica."""
    inside = ProcessGroup(pulse=world.pulse, alone=True)
    inside.traffic = world.traffic
    return Ranks(world, world, inside, Layout(replicate=world.size), Mesh.alone(device))


def meet(world: ProcessGroup, *, layout: Layout, device: torch.device) -> Ranks:
    """The groups of `layout` with as many replicas as this generation has. Collective.

    Raises PeersLost when a rank goes meanwhile.
    """
    if layout.replica_workers == 1:
        return whole(world, device=device)
    now = layout.with_workers(world.size)
    mesh = watched(lambda: build_mesh(now, rank=world.rank, device=device))
    alone = now.replicate == 1
    peers = ProcessGroup(mesh.group("replicate"), pulse=world.pulse, alone=alone)
    inside = ProcessGroup(mesh.group(*REPLICA), pulse=world.pulse)
    peers.traffic = inside.traffic = mesh.traffic = world.traffic
    return Ranks(world, peers, inside, now, mesh)
