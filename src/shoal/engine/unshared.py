"""What replicas that step alone have read, until they meet: `shoal data verify` needs the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shoal.comm.messages import gather_json
from shoal.parallel.ranks import Ranks

Write = Callable[[int, list[int]], None]
"""Writes the digest of all samples of a step, counted from 0."""


class Unshared:
    """Digests of the samples that this replica has read, by step."""

    def __init__(self) -> None:
        self._read: dict[int, list[int]] = {}

    def note(self, step: int, read: list[int]) -> None:
        """Keep the digest of a step, counted from 0, until the replicas meet."""
        self._read[step] = read

    def share(self, ranks: Ranks, *, write: Write) -> None:
        """Add up what all have kept; rank 0 writes it, step by step. Collective over all ranks.

        Raises PeersLost.
        """
        group, counts = ranks.world, ranks.replica_rank == 0  # its digest is its whole replica's
        own, self._read = (self._read if counts else {}), {}
        found: dict[int, torch.Tensor] = {}
        for theirs in gather_json(group, [[step, *read] for step, read in own.items()]):
            for step, *read in theirs:
                more = torch.tensor(read, dtype=torch.int64)  # sums wrap around, as everywhere
                found[step] = found[step] + more if step in found else more
        for step in sorted(found) if group.rank == 0 else ():
            write(step, found[step].tolist())
