"""Optimizers of a parameter server, over the flat part of the parameters that it holds.

`share` is the part of a whole update that a gradient is (one of so many replicas where each push is
applied by itself), `rate` the factor of the schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoal.config.optimizers import SGD, AdamW, OptimizerSection
from shoal.config.server import DelayedNesterov, ServerAdam, ServerSGD
from shoal.sync.server.messages import Region

STATES: dict[str, tuple[str, ...]] = {
    "sgd": ("server/momentum",),
    "adam": ("server/exp_avg", "server/exp_avg_sq"),
    "delayed-nesterov": ("server/momentum", "server/sum"),
}


class ServerOptimizer(ABC):
    """`values`: [n], changed in place. `states` by name, each like `values`; `counts`: numbers."""

    states: dict[str, Tensor]

    @abstractmethod
    def apply(self, gradient: Tensor, *, rate: float, share: float) -> None:
        """One update by `gradient` [n], which may be overwritten."""

    def counts(self) -> dict[str, int]:
        """Numbers to keep with the states."""
        return {}

    def restore(self, counts: Mapping[str, int]) -> None:
        """Count on from there."""
        return


class _OfTorch(ServerOptimizer):
    """An optimizer of torch.optim, one parameter for each region."""

    def __init__(self, values: Tensor, regions: Sequence[Region], *, rate: float) -> None:
        self._rate = rate
        self._spans = [slice(region.start, region.stop) for region in regions]
        self._parameters = [nn.Parameter(values[span]) for span in self._spans]
        self._groups: list[dict[str, Any]] = [
            {"params": [parameter], "weight_decay": region.weight_decay}
            for parameter, region in zip(self._parameters, regions)
        ]
        self._optimizer: torch.optim.Optimizer

    @torch.no_grad()
    def apply(self, gradient: Tensor, *, rate: float, share: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * rate * share
        for parameter, span in zip(self._parameters, self._spans):
            parameter.grad = gradient[span]
        self._optimizer.step()


class _SGD(_OfTorch):
    """SGD, with momentum (of Nesterov) if asked for."""

    def __init__(
        self,
        values: Tensor,
        regions: Sequence[Region],
        *,
        rate: float,
        momentum: float,
        nesterov: bool,
    ) -> None:
        super().__init__(values, regions, rate=rate)
        self._optimizer = torch.optim.SGD(
            self._groups, lr=rate, momentum=momentum, nesterov=nesterov and momentum > 0
        )
        self.states = {"server/momentum": torch.zeros_like(values)} if momentum else {}
        for parameter, span in zip(self._parameters, self._spans) if momentum else ():
            self._optimizer.state[parameter] = {
                "momentum_buffer": self.states["server/momentum"][span]
            }


class _Adam(_OfTorch):
    """AdamW; without weight decay it is Adam."""

    def __init__(
        self,
        values: Tensor,
        regions: Sequence[Region],
        *,
        rate: float,
        betas: tuple[float, float],
        epsilon: float,
    ) -> None:
        super().__init__(values, regions, rate=rate)
        self._optimizer = torch.optim.AdamW(
            self._groups, lr=rate, betas=betas, eps=epsilon, fused=True
        )
        self.states = {name: torch.zeros_like(values) for name in STATES["adam"]}
        average, square = self.states.values()
        self._steps = torch.zeros((), dtype=torch.float32)
        for parameter, span in zip(self._parameters, self._spans):
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": average[span],
                "exp_avg_sq": square[span],
            }

    def counts(self) -> dict[str, int]:
        steps = [int(state["step"]) for state in self._optimizer.state.values()]
        return {"steps": max(steps, default=0)}

    def restore(self, counts: Mapping[str, int]) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(counts.get("steps", 0))


class _DelayedNesterov(ServerOptimizer):
    """Momentum that moves once every `pushes` pushes, so that stale directions are not amplified.

    Liu et al., "Asynchronous Local-SGD Training for Language Modeling" (arXiv 2401.09135),
    algorithm 3 with c = 0. With one push it is Nesterov's SGD.
    """

    def __init__(self, values: Tensor, *, rate: float, momentum: float, pushes: int) -> None:
        self._values, self._rate, self._momentum, self._every = values, rate, momentum, pushes
        self._count = 0
        self.states = {name: torch.zeros_like(values) for name in STATES["delayed-nesterov"]}

    def apply(self, gradient: Tensor, *, rate: float, share: float) -> None:
        momentum, total = self.states.values()
        step = self._rate * rate
        total.add_(gradient, alpha=share)
        self._values.add_(gradient, alpha=-step * share)
        self._count += 1
        if self._count % self._every == 0:
            momentum.mul_(self._momentum).add_(total)
            total.zero_()
            self._values.add_(momentum, alpha=-step * self._momentum)

    def counts(self) -> dict[str, int]:
        return {"pushes": self._count}

    def restore(self, counts: Mapping[str, int]) -> None:
        self._count = counts.get("pushes", 0)


def create(
    section: ServerSGD | ServerAdam | DelayedNesterov | OptimizerSection,
    values: Tensor,
    regions: Sequence[Region],
    *,
    pushes: int,
) -> ServerOptimizer:
    """The optimizer of a recipe's section over `values`.

    `pushes`: how many make up one update over the global batch. Raises ValueError for an optimizer
    that needs whole matrices.
    """
    if isinstance(section, ServerSGD | SGD):
        nesterov = isinstance(section, ServerSGD) and section.nesterov
        return _SGD(
            values,
            regions,
            rate=section.learning_rate,
            momentum=section.momentum,
            nesterov=nesterov,
        )
    if isinstance(section, ServerAdam | AdamW):
        return _Adam(
            values,
            regions,
            rate=section.learning_rate,
            betas=(section.beta1, section.beta2),
            epsilon=section.epsilon,
        )
    if isinstance(section, DelayedNesterov):
        return _DelayedNesterov(
            values, rate=section.learning_rate, momentum=section.momentum, pushes=pushes
        )
    raise ValueError(f"{section.kind} needs whole matrices, which a server's part is not")


def states_of(section: ServerSGD | ServerAdam | DelayedNesterov | OptimizerSection) -> list[str]:
    """Names of the states that `create` makes, in order."""
    tiny = torch.zeros(1)
    return list(create(section, tiny, [Region(0, 1, 0.0)], pushes=1).states)
