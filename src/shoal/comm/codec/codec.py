"""What crosses between replicas: a codec sums a flat vector over a group with fewer bytes.

Every rank gets the same bits: whoever adds up a part sends it on in the codec's form, and uses what
comes out of that form itself. A codec tells what of a rank's own values arrived, so that the rest
can be sent later (error feedback, compression.py); these add up to the result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from shoal.comm.flat import Vector
from shoal.comm.group import Group
from shoal.splitmix import mixed as mixed_words


class Codec(ABC):
    """Sums values over ranks, rounded or left out in part. All ranks call it in the same order."""

    @abstractmethod
    def sum_(self, group: Group, values: Tensor, *, key: int) -> Tensor:
        """Replace flat `values` on every rank by (about) their sum; the same bits on all.

        Returns what of this rank's own values went into the sum. `key`: of the round, the same on
        all ranks; random rounding draws by it. What is not finite makes the sum so. Raises
        PeersLost; the codec's own state is then as it was.
        """

    def commit(self) -> None:
        """The last sum was used: state that it changes is changed now."""
        return

    def vectors(self) -> Iterable[Vector]:
        """State that a run must keep."""
        return ()


class NoCodec(Codec):
    """Values cross as they are."""

    def sum_(self, group: Group, values: Tensor, *, key: int) -> Tensor:
        own = values.clone()
        group.sum_(values)
        return own


class Encoding(Codec):
    """A codec that gives each block of values bytes of its own: summed in two shots.

    Each rank adds up one part of the vector from everybody's bytes, in float32 and in rank order,
    rounds the total once, and sends that to all: two roundings, however many ranks there are (the
    reduction of ZeRO++, arXiv 2306.10209; a ring would round size - 1 times). Each rank sends
    2 (size - 1) / size of the vector's bytes.
    """

    block = 1
    """Values that share a scale; rows are a multiple of it."""

    @abstractmethod
    def num_bytes(self, numel: int) -> int:
        """Bytes of `numel` values, a multiple of `block`."""

    @abstractmethod
    def encode(self, rows: Tensor, *, key: int) -> Tensor:
        """Float rows [n, m] -> uint8 [n, num_bytes(m)]."""

    @abstractmethod
    def decode(self, data: Tensor, *, numel: int) -> Tensor:
        """Uint8 [n, num_bytes(numel)] -> float32 [n, numel]."""

    def part(self, numel: int, *, size: int) -> int:
        """Values that each of `size` ranks adds up: whole blocks, the last ones padding."""
        return -(-numel // (size * self.block)) * self.block

    def sum_(self, group: Group, values: Tensor, *, key: int) -> Tensor:
        numel, size, rank = values.numel(), group.size, group.rank
        part = self.part(numel, size=size)
        rows = values.new_zeros(size * part, dtype=torch.float32)
        rows[:numel] = values
        wire = self.encode(rows.view(size, part), key=mixed(key, rank))
        sent = self.decode(wire, numel=part)
        width = wire.shape[1]
        bounds = [(number * width, (number + 1) * width) for number in range(size)]
        total = torch.zeros_like(sent[rank])
        for (theirs,) in group.slices([wire.view(-1)], bounds):
            total += self.decode(theirs.view(1, -1), numel=part)[0]
        own = self.encode(total.view(1, -1), key=mixed(key, size + rank))
        whole = torch.cat(group.gather(own))
        found = self.decode(whole, numel=part)
        sent[rank] += found[rank] - total  # who rounds the total owes the others the difference
        values.copy_(found.view(-1)[:numel])
        return sent.view(-1)[:numel].to(values.dtype)


def mixed(key: int, *more: int) -> int:
    """A key that depends on all of these; for a generator's seed (63 bits)."""
    for each in more:
        key = int(mixed_words(np.uint64(key))[0]) ^ each
    return int(mixed_words(np.uint64(key))[0]) >> 1


def generator(device: torch.device, key: int) -> torch.Generator:
    """Draws by `key` only."""
    return torch.Generator(device).manual_seed(key)
