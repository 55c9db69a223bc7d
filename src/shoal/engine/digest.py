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


def _hash(tensor: Tensor) -> int:
    plain = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_64_intdigest(plain.data)


def digest_of(state: FlatState) -> int:
    """One 64-bit hash of parameters and optimizer state."""
    total = xxhash.xxh3_64()
    for vector in (state.values, *state.moments.values()):
        total.update(_hash(vector).to_bytes(8, "little"))
    return total.intdigest()


class ReplicasDiffer(Exception):
    """Replicas that must be equal are not; raised on every rank, with everybody's digest."""

    def __init__(self, digests: Sequence[int]) -> None:
        self.digests = list(digests)
        super().__init__(f"replicas hold different states: {self.digests}")

    @property
    def majority(self) -> list[int]:
        """The ranks that agree, when they are more than half; else none."""
        value, count = Counter(self.digests).most_common(1)[0]
        if 2 * count <= len(self.digests):
            return []
        return [rank for rank, digest in enumerate(self.digests) if digest == value]


def differing_tensors(group: Group, state: FlatState) -> dict[str, list[int]]:
    """`kind name` -> the ranks whose tensor is not what most have (all of them, in a tie)."""
    kinds = ("parameter", *state.moments)
    own = {f"{k} {name}": _hash(t) for k in kinds for name, t in state.named(k).items()}
    everybody = gather_json(group, {name: f"{value:016x}" for name, value in own.items()})
    found: dict[str, list[int]] = {}
    for name in own:
        values = [theirs[name] for theirs in everybody]
        usual, count = Counter(values).most_common(1)[0]
        if count < len(values):
            tie = 2 * count <= len(values)
            found[name] = [r for r, value in enumerate(values) if tie or value != usual]
    return found
