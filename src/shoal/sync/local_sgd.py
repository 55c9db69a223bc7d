"""Policy local-sgd: replicas step by themselves and average their parameters every H steps.

Stich, "Local SGD converges fast and communicates little" (arXiv 1805.09767); with first steps that
are taken together, Lin et al., "Don't use large mini-batches, use local SGD" (arXiv 1808.07217).
The average is weighted by the targets that each replica has trained on since the last one; with
H = 1 and plain SGD that is the step over the global batch.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from shoal.config.sync import LocalSGD as Section
from shoal.sync.policy import Division, Given
from shoal.sync.rounds import Rounds, weighted_mean_


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
    ) -> None:
        super().__init__(division, every_steps=every_steps, steps=steps, start_steps=start_steps)
        self._values = values

    @classmethod
    def of(cls, section: Section, given: Given) -> LocalSGD:
        return cls(
            given.division,
            values=given.values,
            every_steps=section.every_steps,
            steps=given.steps,
            start_steps=section.start_steps,
        )

    def _meet(self, step: int, *, share: float) -> None:
        weighted_mean_(self, self._values, share=share)
