"""Hashes of the training state, by which replicas notice that one of them holds other bits.

A flipped bit in memory is never noticed otherwise: gradients of wrong weights look like gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from shoal.comm.group import Group
from shoal.comm.messages import gather_json
from shoal.engine.state import FlatState
from shoal.layout import Layout


def hash_of(tensor: Tensor) -> int:
    """64 bits of a tensor's bytes."""
    plain = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_64_intdigest(plain.data)


def digest_of(state: FlatState, *, everything: bool = False, steady: bool = False) -> int:
    """One 64-bit hash of what replicas must have alike; `everything`: of all that is handed on.

    `steady`: of what they must have alike also while they step by themselves.
    """
    total = xxhash.xxh3_64()
    for vector in state.vectors.values():
        if vector.must_equal(steady=steady) or everything:
            total.update(hash_of(vector.tensor).to_bytes(8, "little"))
    return total.intdigest()


Move = tuple[int, list[int]]
"""A rank, and the ranks that get its state."""


class ReplicasDiffer(Exception):
    """Ranks that must be equal are not; raised on every rank, with everybody's digest.

    `layout` says who must be equal: the ranks at one position, one of each replica.
    """

    def __init__(self, digests: Sequence[int], *, layout: Layout) -> None:
        self.digests, self.layout = list(digests), layout
        super().__init__(f"replicas hold different states: {self.digests}")

    def repairs(self) -> list[Move] | None:
        """Who gives whom its state: at each position the majority; None where there is none."""
        moves: list[Move] = []
        for replica_rank in range(self.layout.replica_workers):
            own = {rank: self.digests[rank] for rank in self.layout.peers(replica_rank)}
            value, count = Counter(own.values()).most_common(1)[0]
            if count == len(own):
                continue
            if 2 * count <= len(own):
                return None
            good = [rank for rank in own if own[rank] == value]
            moves.append((good[0], [rank for rank in own if own[rank] != value]))
        return moves


def compare(digests: Sequence[int], *, layout: Layout) -> None:
    """Raises ReplicasDiffer unless the ranks at each position have one digest."""
    for replica_rank in range(layout.replica_workers):
        if len({digests[rank] for rank in layout.peers(replica_rank)}) > 1:
            raise ReplicasDiffer(digests, layout=layout)


def differing_tensors(
    group: Group, state: FlatState, *, layout: Layout, steady: bool = False
) -> dict[str, list[int]]:
    """`kind name` -> ranks whose tensor is not what most of their peers have (a tie: all).

    `steady`: as for `digest_of`.
    """
    kinds = [kind for kind, each in state.vectors.items() if each.must_equal(steady=steady)]
    own = {f"{k} {name}": hash_of(t) for k in kinds for name, t in state.named(k).items()}
    everybody = gather_json(group, {name: f"{value:016x}" for name, value in own.items()})
    found: dict[str, list[int]] = {}
    for replica_rank in range(layout.replica_workers):
        peers = layout.peers(replica_rank)
        for name in everybody[peers[0]]:
            values = {rank: everybody[rank][name] for rank in peers}
            usual, count = Counter(values.values()).most_common(1)[0]
            if count < len(values):
                tie = 2 * count <= len(values)
                wrong = [rank for rank, value in values.items() if tie or value != usual]
                found[name] = sorted([*found.get(name, []), *wrong])
    return found
