"""What policies with rounds have in common: steps of a replica's own, then a meeting of all.

The first `start_steps` steps are taken together: gradients are summed as under every-step, so all
replicas stay the same, optimizer state included. A round that a lost peer prevented is held before
the next step; what a replica has trained on since the last one is its weight in the round.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from shoal.comm.flat import Span
from shoal.comm.group import Group
from shoal.layout import Share
from shoal.sync.every_step import sum_of
from shoal.sync.policy import Division, Gradients, Policy, Reduced


class Rounds(Policy):
    """A round follows every `every_steps` steps after the start, and the last of `steps`."""

    alone = True

    def __init__(
        self,
        division: Division,
        *,
        every_steps: int | Literal["end"],
        steps: int,
        start_steps: int = 0,
    ) -> None:
        super().__init__(division)
        self._every = steps if every_steps == "end" else every_steps
        self._steps, self._start = steps, start_steps
        self._step = 0
        self._targets = 0
        self._met_at = 0

    @abstractmethod
    def _meet(self, step: int, *, share: float) -> None:
        """The round after `step` steps, of which `share` is this replica's. Raises PeersLost, and
        then has changed nothing."""

    def share(self, step: int) -> Share:
        return self.shares.own(self.peers.rank, step, alone=step >= self._start)

    @property
    def round(self) -> int:
        return self._met_at

    def before_step(self, step: int) -> None:
        """The round that a lost peer has prevented, if any."""
        self._step = step
        if self._due(step) and self._met_at < step:
            self._hold(step)

    @torch.no_grad()
    def reduce(self, gradients: Gradients) -> Reduced:
        flat = sum_of(gradients.nodes) if gradients.nodes else gradients.flat
        span = Span(0, flat.numel())
        if self._step >= self._start or self.peers.size == 1:
            return Reduced(span, flat)
        self.peers.barrier()
        total = total_of(self.peers, gradients.targets)
        flat.mul_(gradients.targets / max(total, 1))  # of a mean over one's own targets
        self.peers.sum_(flat)
        return Reduced(span, flat, targets=total)

    def after_step(self, step: int, *, targets: int) -> None:
        if step < self._start:
            self.begin(step + 1)
            return
        self._targets += targets
        if self._due(step + 1):
            self._hold(step + 1)

    def _due(self, step: int) -> bool:
        since = step - self._start
        return since > 0 and (since % self._every == 0 or step == self._steps)

    @torch.no_grad()
    def _hold(self, step: int) -> None:
        share = 1.0
        if self.peers.size > 1:
            self.peers.barrier()  # so that waiting for a slow rank is told apart
            total = total_of(self.peers, self._targets)
            share = self._targets / total if total else 1 / self.peers.size
        self._meet(step, share=share)
        self._met_at, self._targets = step, 0

    def equal_after(self, step: int) -> bool:
        return self.peers.size == 1 or step == self._met_at

    def begin(self, step: int) -> None:
        self._met_at, self._targets = step, 0

    def facts(self) -> dict[str, Any]:
        return {"targets": self._targets, "met_at": self._met_at}

    def restore(self, facts: Mapping[str, Any]) -> None:
        self._targets, self._met_at = int(facts["targets"]), int(facts["met_at"])


def total_of(group: Group, targets: int) -> int:
    """Targets of all replicas of a group."""
    count = torch.tensor([targets], dtype=torch.int64)
    group.sum_(count)
    return int(count)


def weighted_mean_(group: Group, values: Tensor, *, share: float) -> None:
    """Replace `values` by their mean over a group; nothing changes if a peer is lost."""
    if group.size > 1:
        mean = values * share
        group.sum_(mean)
        values.copy_(mean)
