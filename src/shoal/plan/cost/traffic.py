"""Time of collectives and point-to-point messages over the links of a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from shoal.plan.cost.constants import Constants
from shoal.plan.hardware import Cluster


@dataclass(frozen=True)
class Group:
    """Ranks that talk: `size` of them, every `stride`-th rank, so that some share a node."""

    size: int
    stride: int = 1


def ring_bytes(operation: str, *, num_bytes: float, size: int) -> float:
    """Bytes that each rank sends in a ring collective over a tensor of `num_bytes` (whole).

    all-reduce 2 (n-1)/n, all-gather, reduce-scatter and all-to-all (n-1)/n of it (Patarasuk and
    Yuan 2009, the bandwidth-optimal bound).
    """
    share = (size - 1) / size
    return num_bytes * share * (2 if operation == "all-reduce" else 1)


@dataclass(frozen=True)
class Traffic:
    """Times over the links of one cluster."""

    cluster: Cluster
    constants: Constants

    def local_ranks(self, group: Group) -> int:
        """How many ranks of the group share a node."""
        return max(1, min(group.size, self.cluster.node_devices // group.stride))

    def rate(self, group: Group) -> float:
        """Bytes per second that each rank of the ring can send.

        Inside a node the fast link; across nodes the adapters of the group's ranks in one node
        together, as long as the fast link can feed them.
        """
        link = self.cluster.slowest.node_link_bytes_per_second * self.constants.link_share
        local = self.local_ranks(group)
        if local == group.size:
            return link
        network = self.cluster.network_bytes_per_second * self.constants.network_share * local
        return min(link, network) if local > 1 else network

    def latency(self, group: Group, *, operation: str = "all-gather") -> float:
        """Seconds before the last byte could move: one start, and the hops of the ring.

        An all-reduce over many nodes uses trees: hops grow with the logarithm of the nodes.
        """
        constants = self.constants
        local = self.local_ranks(group)
        nodes = -(-group.size // local)
        hops = (local - 1) * constants.link_hop_seconds
        far = nodes - 1.0
        if operation == "all-reduce" and nodes > 1:
            far = min(2 * far, 2 * log2(nodes))
        hop = constants.network_hop_seconds
        if self.cluster.fabric in {"efa", "ethernet"}:
            hop = constants.cloud_hop_seconds
        return constants.collective_seconds + hops + far * hop

    def collective(
        self, operation: str, *, group: Group, num_bytes: float, pieces: float = 1.0
    ) -> float:
        """Seconds of a collective over `num_bytes` in `pieces` calls; 0 for a group of one."""
        if group.size <= 1 or num_bytes <= 0:
            return 0.0
        sent = ring_bytes(operation, num_bytes=num_bytes, size=group.size)
        start = self.latency(group, operation=operation) * max(1.0, pieces)
        return start + sent / self.rate(group)

    def send(self, group: Group, *, num_bytes: float) -> float:
        """Seconds of one message to the next rank of the group."""
        if group.size <= 1:
            return 0.0
        # Neighbouring stages lie in different nodes as soon as one node cannot hold two.
        pair = Group(2, group.stride)
        return self.constants.collective_seconds + num_bytes / self.rate(pair)
