"""Policy gossip: replicas step by themselves and average with neighbours; nobody waits for all.

Lian et al., "Can decentralized algorithms outperform centralized algorithms?" (D-PSGD, arXiv
1705.09056) on a ring; the one-peer exponential graph of Assran et al. (arXiv 1811.10792) and Ying
et al. (arXiv 2110.13363). Each exchange multiplies the replicas' parameters by a doubly stochastic
matrix: their mean stays, and what they differ by shrinks.
"""

from __future__ import annotations

from typing import Literal

import torch

from shoal.comm.codec.compression import Note
from shoal.comm.flat import Span
from shoal.config.sync import Gossip as Section
from shoal.sync.every_step import sum_of
from shoal.sync.policy import Given, Gradients, Policy, Reduced
from shoal.sync.rounds import weighted_mean_


def distances(graph: Literal["ring", "exponential"], *, size: int, number: int) -> list[int]:
    """How far the ranks are with which a rank averages in exchange `number`, from 0."""
    if size == 1:
        return []
    if graph == "ring":
        return [1, -1] if size > 2 else [1]
    return [2 ** (number % max(1, (size - 1).bit_length()))]


class Gossip(Policy):
    """`given.values`: this rank's flat parameters. An exchange that a lost peer prevents is left
    out; the average at the end is made up for."""

    alone = True

    def __init__(self, section: Section, given: Given) -> None:
        super().__init__(given.division)
        self._section, self._values, self._steps = section, given.values, given.steps
        self._equal_at = 0
        self._notes: list[Note] = []

    @classmethod
    def of(cls, section: Section, given: Given) -> Gossip:
        return cls(section, given)

    @property
    def round(self) -> int:
        return self._equal_at

    def before_step(self, step: int) -> None:
        """The average at the end, if a lost peer has prevented it."""
        if step == self._steps and self._equal_at != step:
            self._average(step)

    def reduce(self, gradients: Gradients) -> Reduced:
        flat = sum_of(gradients.nodes) if gradients.nodes else gradients.flat
        return Reduced(Span(0, flat.numel()), flat)

    @torch.no_grad()
    def after_step(self, step: int, *, targets: int) -> None:
        done = step + 1
        if done == self._steps:
            self._average(done)
        elif done % self._section.every_steps == 0:
            self.exchange(done // self._section.every_steps - 1)
        if self.meets_after(done) and done != self._steps:
            self._measure()

    @torch.no_grad()
    def exchange(self, number: int) -> None:
        """Average with the neighbours of exchange `number`."""
        rank, size = self.peers.rank, self.peers.size
        far = distances(self._section.graph, size=size, number=number)
        others = [
            self.peers.swap(self._values, to=(rank + d) % size, source=(rank - d) % size)
            for d in far
        ]
        for other in others:  # only once all are here, or a lost peer would leave half of it
            self._values.add_(other)
        self._values.div_(1 + len(others))

    @torch.no_grad()
    def _average(self, step: int) -> None:
        weighted_mean_(self.peers, self._values, share=1 / self.peers.size)
        self._equal_at = step

    def _measure(self) -> None:
        """Note how far replicas are from their mean: the root of the mean of squares."""
        size = self.peers.size
        if size == 1:
            return
        mean = self._values / size
        self.peers.sum_(mean)
        squares = torch.stack(
            [(self._values - mean).double().square().sum(), mean.double().square().sum()]
        )
        self.peers.sum_(squares)
        apart, length = float(squares[0] / size) ** 0.5, float(squares[1] / size) ** 0.5
        text = f"replicas are {apart / max(length, 1e-30):.2e} of their mean's length away from it"
        self._notes.append(("consensus", {"distance": apart, "mean_norm": length, "text": text}))

    def equal_after(self, step: int) -> bool:
        return self.peers.size == 1 or step == self._equal_at

    def meets_after(self, step: int) -> bool:
        return self.equal_after(step) or step % self._section.meet_every_steps == 0

    def begin(self, step: int) -> None:
        self._equal_at = step

    def facts(self) -> dict[str, int]:
        return {"equal_at": self._equal_at}

    def restore(self, facts: dict[str, int]) -> None:  # type: ignore[override]
        self._equal_at = int(facts["equal_at"])

    def notes(self) -> list[Note]:
        found, self._notes = self._notes, []
        return found
