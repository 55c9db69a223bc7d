"""Policy hogwild: threads step on one copy of the parameters, without locks and without waiting.

Niu et al., "Hogwild!" (arXiv 1106.5730): proven for sparse updates; of a dense model it is
asynchronous SGD whose reads and writes may be torn between two elements. Every thread applies its
own gradient with the whole learning rate. All meet now and then, and to evaluate and save.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shoal.comm.flat import Span
from shoal.config.sync import Hogwild as Section
from shoal.sync.every_step import sum_of
from shoal.sync.policy import Division, Given, Gradients, Policy, Reduced


class Hogwild(Policy):
    """`meet_every`: steps from one meeting of all threads to the next; the last of `steps` too."""

    keeps_equal_state = True  # there is one, which all share
    alone = True

    @classmethod
    def of(cls, section: Section, given: Given) -> Hogwild:
        every = section.meet_every_steps
        return cls(given.division, meet_every=every, steps=given.steps)

    def __init__(self, division: Division, *, meet_every: int, steps: int) -> None:
        super().__init__(division)
        self._every, self._steps = meet_every, steps

    def reduce(self, gradients: Gradients) -> Reduced:
        flat = sum_of(gradients.nodes) if gradients.nodes else gradients.flat
        return Reduced(Span(0, flat.numel()), flat)

    def meets_after(self, step: int) -> bool:
        return step % self._every == 0 or step == self._steps

    @contextmanager
    def gathered(self, *, last: bool) -> Iterator[None]:
        self.peers.barrier()  # nobody writes while parameters are evaluated and saved
        yield
        self.peers.barrier()
