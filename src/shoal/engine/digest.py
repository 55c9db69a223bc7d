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


def hash_of(tensor: Tensor) -> int:
    """64 bits of a tensor's bytes."""
    plain = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_64_intdigest(plain.data)


def digest_of(state: FlatState) -> int:
    """One 64-bit hash of parameters and optimizer state."""
    total = xxhash.xxh3_64()
    for vector in (state.values, *state.moments.values()):
        total.update(hash_of(vector).to_bytes(8, "little"))
    return total.intdigest()


Move = tuple[int, list[int]]
"""A rank, and the ranks that get its state."""


class ReplicasDiffer(Exception):
    """Ranks that must be equal are not; raised on every rank, with everybody's digest.

    `places`: ranks of one replica, each of which has a part of its own; rank r is at place
    r % places, and equal to the ranks at that place in the other replicas.
    """

    def __init__(self, digests: Sequence[int], *, places: int = 1) -> None:
        self.digests, self.places = list(digests), places
        super().__init__(f"replicas hold different states: {self.digests}")

    def repairs(self) -> list[Move] | None:
        """Who gives whom its state: at each place the majority; None where there is none."""
        moves: list[Move] = []
        for place in range(self.places):
            ranks = range(place, len(self.digests), self.places)
            own = {rank: self.digests[rank] for rank in ranks}
            value, count = Counter(own.values()).most_common(1)[0]
            if count == len(own):
                continue
            if 2 * count <= len(own):
                return None
            good = [rank for rank in ranks if own[rank] == value]
            moves.append((good[0], [rank for rank in ranks if own[rank] != value]))
        return moves


def compare(digests: Sequence[int], *, places: int = 1) -> None:
    """Raises ReplicasDiffer unless ranks at one place have one digest."""
    if any(len(set(digests[place::places])) > 1 for place in range(places)):
        raise ReplicasDiffer(digests, places=places)


def differing_tensors(group: Group, state: FlatState) -> dict[str, list[int]]:
    """`kind name` -> ranks whose tensor is not what most at their place have (a tie: all)."""
    kinds, places = ("parameter", *state.moments), state.cut.workers
    own = {f"{k} {name}": hash_of(t) for k in kinds for name, t in state.named(k).items()}
    everybody = gather_json(group, {name: f"{value:016x}" for name, value in own.items()})
    found: dict[str, list[int]] = {}
    for name in own:
        for place in range(places):
            values = {rank: everybody[rank][name] for rank in range(place, group.size, places)}
            usual, count = Counter(values.values()).most_common(1)[0]
            if count < len(values):
                tie = 2 * count <= len(values)
                wrong = [rank for rank, value in values.items() if tie or value != usual]
                found[name] = sorted([*found.get(name, []), *wrong])
    return found
