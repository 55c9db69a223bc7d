"""Policy diloco: H steps of a replica's own, then one outer step on what all have moved by.

Douillard et al., "DiLoCo: distributed low-communication training of language models"
(arXiv 2311.08105): the inner optimizer keeps its state over rounds and shares none; the outer one
is SGD with Nesterov momentum. The outer gradient, anchor - parameters, is a mean weighted by the
targets that each replica has trained on; a codec may compress it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.comm.codec.codec import mixed
from shoal.comm.codec.compression import Compression, Note
from shoal.comm.codec.kinds import create
from shoal.comm.flat import Vector
from shoal.config.sync import DiLoCo as Section
from shoal.config.sync import StreamingDiLoCo
from shoal.sync.outer import Outer
from shoal.sync.policy import Given
from shoal.sync.rounds import Rounds


class DiLoCo(Rounds):
    """`Outer` and `Compression` hold its state; `values` are this rank's flat parameters."""

    def __init__(self, section: Section, given: Given) -> None:
        super().__init__(
            given.division,
            every_steps=section.every_steps,
            steps=given.steps,
            start_steps=section.start_steps,
        )
        self._values, self._seed = given.values, given.seed
        self.outer = outer_of(section, given)
        self._compression: Compression = create(
            section.codec, given.layout, like=given.values, what="outer"
        )
        self._dropped: list[Note] = []

    @classmethod
    def of(cls, section: Section, given: Given) -> DiLoCo:
        return cls(section, given)

    def _meet(self, step: int, *, share: float) -> None:
        moved: Tensor = (self.outer.anchor - self._values).mul_(share)
        self._compression.sum_(self.peers, moved, key=mixed(self._seed, step))
        if bool(torch.isfinite(moved).all()):
            self.outer.step(moved)
        else:
            text = "a replica's parameters are not finite: all go back to where the round began"
            self._dropped.append(("round-dropped", {"text": text}))
        self._compression.commit()
        self._values.copy_(self.outer.anchor)

    @torch.no_grad()
    def begin(self, step: int) -> None:
        super().begin(step)
        self.outer.anchor.copy_(self._values)

    def vectors(self) -> Iterable[Vector]:
        return (*self._compression.vectors(), *self.outer.vectors())

    def notes(self) -> list[Note]:
        dropped, self._dropped = self._dropped, []
        return [*dropped, *self._compression.notes()]

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "codec": self._compression.facts()}

    def restore(self, facts: Mapping[str, Any]) -> None:
        super().restore(facts)
        self._compression.restore(facts.get("codec", {}))


def outer_of(section: Section | StreamingDiLoCo, given: Given) -> Outer:
    """The outer optimizer of a recipe's section."""
    return Outer(
        given.values,
        given.layout,
        learning_rate=section.outer_learning_rate,
        momentum=section.outer_momentum,
        nesterov=section.nesterov,
    )
