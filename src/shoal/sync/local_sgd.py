"""Policy local-sgd: replicas step by themselves and average their parameters every H steps.

Stich, "Local SGD converges fast and communicates little" (arXiv 1805.09767). The average is
weighted by the targets that each replica has trained on since the last one; with H = 1 and plain
SGD that is the step over the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.comm.flat import Span
from shoal.config.sync import LocalSGD as Section
from shoal.sync.every_step import sum_of
from shoal.sync.policy import Division, Given, Gradients, Policy, Reduced


class LocalSGD(Policy):
    """`values`: this rank's flat parameters, which a round replaces by their average over peers.

    A round follows every `every_steps` steps, and the last of `steps`.
    """

    alone = True

    def __init__(self, division: Division, *, values: Tensor, every_steps: int, steps: int) -> None:
        super().__init__(division)
        self._values, self._every, self._steps = values, every_steps, steps
        self._targets = 0
        self._averaged_at = 0

    @classmethod
    def of(cls, section: Section, given: Given) -> LocalSGD:
        every = section.every_steps
        return cls(given.division, values=given.values, every_steps=every, steps=given.steps)

    def before_step(self, step: int) -> None:
        """The round that a lost peer has prevented, if any."""
        if self._due(step) and self._averaged_at < step:
            self._average(step)

    def reduce(self, gradients: Gradients) -> Reduced:
        flat = sum_of(gradients.nodes) if gradients.nodes else gradients.flat
        return Reduced(Span(0, flat.numel()), flat)

    def after_step(self, step: int, *, targets: int) -> None:
        self._targets += targets
        if self._due(step + 1):
            self._average(step + 1)

    def _due(self, step: int) -> bool:
        return step > 0 and (step % self._every == 0 or step == self._steps)

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Replace the parameters by their weighted mean; nothing changes if a peer is lost."""
        if self.peers.size > 1:
            self.peers.barrier()  # so that waiting for a slow rank is told apart
            weight = torch.tensor([float(self._targets)], dtype=torch.float64)
            self.peers.sum_(weight)
            share = self._targets / weight.item() if weight.item() else 1 / self.peers.size
            mean = self._values * share
            self.peers.sum_(mean)
            self._values.copy_(mean)
        self._averaged_at, self._targets = step, 0

    def equal_after(self, step: int) -> bool:
        return self.peers.size == 1 or step == self._averaged_at

    def begin(self, step: int) -> None:
        self._averaged_at, self._targets = step, 0

    def facts(self) -> dict[str, Any]:
        return {"targets": self._targets, "averaged_at": self._averaged_at}

    def restore(self, facts: Mapping[str, Any]) -> None:
        self._targets, self._averaged_at = int(facts["targets"]), int(facts["averaged_at"])
