"""What replicas that step alone know by themselves until they meet: what they read and want."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shoal.comm.group import Group
from shoal.comm.messages import gather_json
from shoal.engine.step import Votes
from shoal.engine.training import Training
from shoal.parallel.ranks import Ranks

Write = Callable[[int, list[int]], None]
"""Writes the digest of all samples of a step, counted from 0."""


def votes_of_all(votes: Votes, *, training: Training, group: Group) -> Votes:
    """What any rank wants, and whether any diverges. Collective over all ranks; PeersLost."""
    watch, shares = training.watch, training.policy.shares
    step = training.progress.step - 1  # the one just taken
    told = shares.told(step)
    mine = torch.zeros(4 + (0 if told is None else group.size), dtype=torch.int64)
    mine[:4] = torch.tensor([votes.stop, votes.save, votes.leave, watch.diverges])
    if told is not None:
        mine[4 + group.rank] = told
    group.sum_(mine)
    stop, save, leave, diverged = (count > 0 for count in mine[:4].tolist())
    watch.agree(diverged)
    if told is not None:
        shares.agree(mine[4:].tolist(), step=step, alone=True)
    return Votes(stop, save, leave)


class Unshared:
    """Digests of the samples that this replica has read, by step: `data verify` needs the whole."""

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
