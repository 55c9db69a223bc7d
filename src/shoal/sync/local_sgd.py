"""Policy local-sgd: replicas step by themselves and average their parameters every H steps.

Stich, "Local SGD converges fast and communicates little" (arXiv 1805.09767); with first steps that
are taken together, Lin et al., "Don't use large mini-batches, use local SGD" (arXiv 1808.07217).
The average is weighted by the targets that each replica has trained on since the last one; with
H = 1 and plain SGD that is the step over the global batch.

With groups it is hierarchical (Lin et al., section 5; torch's HierarchicalModelAverager): replicas
of a group, such as those of one host, average among themselves, and now and then all groups do.
Between groups each replica then sends its part of the parameters only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from shoal.comm.group import Group
from shoal.config.sync import LocalSGD as Section
from shoal.sync.policy import Division, Given, two_levels
from shoal.sync.rounds import Rounds, total_of, weighted_mean_


class LocalSGD(Rounds):
    """`values`: this rank's flat parameters, which a round replaces by their average over peers."""

    def __init__(
        self,
        division: Division,
        *,
        values: Tensor,
        every_steps: int | Literal["end"],
        steps: int,
        start_steps: int = 0,
        group_replicas: int | None = None,
        outer_every_steps: int | None = None,
    ) -> None:
        super().__init__(division, every_steps=every_steps, steps=steps, start_steps=start_steps)
        self._values = values
        self._within, self._outer = group_replicas, outer_every_steps
        self._near: Group | None = None
        """This replica's group; None: all average every time."""
        self._far: Group | None = None
        """One replica of each group, all at this one's place in it."""
        self._near_at = self._all_at = self._group_targets = 0
        """When the group and when all have averaged last, and on how many targets the group has
        trained since all did."""

    @classmethod
    def of(cls, section: Section, given: Given) -> LocalSGD:
        return cls(
            given.division,
            values=given.values,
            every_steps=section.every_steps,
            steps=given.steps,
            start_steps=section.start_steps,
            group_replicas=section.group_replicas,
            outer_every_steps=section.outer_every_steps,
        )

    def enter(self, *, world: Group, peers: Group, inside: Group) -> None:
        super().enter(world=world, peers=peers, inside=inside)
        levels = two_levels(peers, self._within, world=world)
        self._near, self._far = levels or (None, None)

    @property
    def round(self) -> int:
        return self._near_at + self._all_at

    def _meet(self, step: int, *, share: float) -> None:
        weighted_mean_(self.peers, self._values, share=share)
        self._near_at, self._all_at, self._group_targets = step, step, 0

    def _hold(self, step: int) -> None:
        if self._near is None:
            super()._hold(step)
            return
        if self._near_at < step:
            self._near.barrier()  # so that waiting for a slow rank is told apart
            total = total_of(self._near, self._targets)
            share = self._targets / total if total else 1 / self._near.size
            weighted_mean_(self._near, self._values, share=share)
            self._near_at, self._targets = step, 0
            self._group_targets += total
        if self._is_outer(step):
            self._average_groups()
            self._all_at, self._group_targets = step, 0
        self._met_at = step

    def _is_outer(self, step: int) -> bool:
        assert self._outer is not None, "given with groups"
        return (step - self._start) % self._outer == 0 or step == self._steps

    @torch.no_grad()
    def _average_groups(self) -> None:
        """Replicas of a group hold the same: each averages a part with its like, and tells them."""
        near, far = self._near, self._far
        assert near is not None and far is not None, "there are groups"
        far.barrier()
        total = total_of(far, self._group_targets)
        share = self._group_targets / total if total else 1 / far.size
        numel = self._values.numel()
        each = -(-numel // near.size)
        part = self._values.new_zeros(each)
        own = self._values[near.rank * each : (near.rank + 1) * each]
        part[: own.numel()] = own
        weighted_mean_(far, part, share=share)
        self._values.copy_(torch.cat(near.gather(part))[:numel])

    def equal_after(self, step: int) -> bool:
        return self.peers.size == 1 or step == self._all_at

    def begin(self, step: int) -> None:
        super().begin(step)
        self._near_at = self._all_at = step
        self._group_targets = 0

    def facts(self) -> dict[str, Any]:
        more = {"near_at": self._near_at, "all_at": self._all_at}
        return {**super().facts(), **more, "group_targets": self._group_targets}

    def restore(self, facts: Mapping[str, Any]) -> None:
        super().restore(facts)
        self._near_at = int(facts.get("near_at", self._met_at))
        self._all_at = int(facts.get("all_at", self._met_at))
        self._group_targets = int(facts.get("group_targets", 0))
