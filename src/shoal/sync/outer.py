"""The outer optimizer of DiLoCo: SGD with Nesterov momentum on what replicas moved by."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from shoal.comm.flat import FlatLayout, Vector


class Outer:
    """Anchor (the parameters after the last round) and momentum: the same on all replicas."""

    def __init__(
        self,
        values: Tensor,
        layout: FlatLayout,
        *,
        learning_rate: float,
        momentum: float,
        nesterov: bool,
    ) -> None:
        self._rate, self._mu, self._nesterov = learning_rate, momentum, nesterov
        self.anchor, self.momentum = values.detach().clone(), torch.zeros_like(values)
        regions = frozenset(layout.regions) - {"frozen"}
        self._vectors = [
            Vector(kind, tensor, regions, steady=True, optional=True)
            for kind, tensor in (("outer/anchor", self.anchor), ("outer/momentum", self.momentum))
        ]

    def vectors(self) -> Iterable[Vector]:
        """Both; the momentum last."""
        return self._vectors

    @torch.no_grad()
    def step(self, moved: Tensor, *, span: slice = slice(None)) -> None:
        """Move the anchor. `moved`: mean over replicas of anchor - parameters, which it overwrites;
        of the elements `span`.

        As torch.optim.SGD has it (Sutskever et al. 2013): v = mu v + g, and g + mu v is the step.
        """
        anchor, velocity = self.anchor[span], self.momentum[span]
        velocity.mul_(self._mu).add_(moved)
        step = moved.add_(velocity, alpha=self._mu) if self._nesterov else velocity
        anchor.sub_(step, alpha=self._rate)
