"""One optimizer step: reduce, finite?, clip, rate, apply. All ranks come to the same outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.config.optimizers import OptimizerSection, ScheduleSection
from shoal.engine.optimizers import build_optimizers
from shoal.engine.schedule import rate_factor
from shoal.engine.state import FlatState
from shoal.engine.step import StepResult, Votes
from shoal.parallel.precision import LossScale
from shoal.sync.policy import Policy, Reduced


@dataclass(frozen=True)
class Outcome:
    """What a step came to; the same on every rank that stepped together."""

    step: StepResult
    gradient_norm: float
    learning_rate: float
    applied: bool

    @property
    def votes(self) -> Votes:
        """What anybody wanted after this step."""
        return self.step.counted.votes


class Update:
    """Applies summed gradients to the part of the parameters that this rank owns."""

    def __init__(
        self,
        state: FlatState,
        *,
        policy: Policy,
        optimizer: OptimizerSection,
        schedule: ScheduleSection,
        steps: int,
        max_gradient_norm: float | None,
        cut_norm: Callable[[Mapping[str, Tensor]], float] | None = None,
        loss_scale: LossScale | None = None,
        compute: torch.dtype = torch.float32,
        keep_zeros: bool = False,
    ) -> None:
        """`cut_norm`: gives the norm of gradients by name where each rank has a part of a replica.

        `loss_scale`: by what the gradients were multiplied; changed after each step. `compute`: of
        the run's matrix products. `keep_zeros`: of matrices, weights that are 0 have no gradient.
        """
        self._loss_scale = loss_scale
        self._state, self._policy, self._cut_norm = state, policy, cut_norm
        self._keep_zeros = keep_zeros
        self._moves: Tensor | None = None
        self._schedule, self._steps = schedule, steps
        self._limit = max_gradient_norm
        self._settings = optimizer
        owned = policy.owned(state.layout, numel=state.trainable_numel)
        self._owned, self._optimizers = build_optimizers(state, owned, optimizer, compute=compute)
        self.on_reduced: Callable[[int, Reduced, float], None] = lambda step, reduced, norm: None
        """Called with the number of the step, the summed gradients before clipping, their norm."""
        self.step = 0
        """Optimizer steps applied or skipped so far: what the schedule counts."""

    @torch.no_grad()
    def apply(self, result: StepResult) -> Outcome:
        """Reduce `result`'s gradients over replicas and apply them, unless they are not finite."""
        reduced = self._policy.reduce(result.gradients)
        if self._loss_scale is not None:
            reduced.values.div_(self._loss_scale.value)
        if self._keep_zeros:
            reduced.values.mul_(self._moving()[reduced.span.start : reduced.span.stop])
        norm = self._norm(reduced)
        self.on_reduced(self.step, reduced, norm)
        self._policy.peers.pulse.mark("apply")
        rate = self._set_rates()
        targets = result.targets if reduced.targets is None else reduced.targets
        applied = math.isfinite(norm) and targets > 0
        if applied:
            if self._limit is not None and norm > self._limit:
                reduced.values.mul_(self._limit / (norm + 1e-6))
            for own in self._owned:
                start, stop = own.span.start - reduced.span.start, own.span.stop
                part = reduced.values[start : stop - reduced.span.start]
                own.parameter.grad = part.view(own.shape)
            for optimizer in self._optimizers:
                optimizer.step()
        if self._loss_scale is not None and targets > 0:
            self._loss_scale.update(overflowed=not applied)
        self.step += 1
        return Outcome(step=result, gradient_norm=norm, learning_rate=rate, applied=applied)

    def _moving(self) -> Tensor:
        """0 for the weights of matrices that are 0, else 1; asked first when all values are there.

        Without a gradient, and times any decay, what is 0 stays 0: under AdamW and under SGD.
        """
        if self._moves is None:
            self._moves = torch.ones_like(self._state.gradients)
            values = self._state.trainable(self._state.values)
            for name, moves in self._state.trainable(self._moves).items():
                if moves.dim() > 1:
                    moves.copy_(values[name] != 0)
        return self._moves

    def _norm(self, reduced: Reduced) -> float:
        """Of the summed gradients over the whole model; the same on every rank."""
        if self._cut_norm is not None:
            return self._cut_norm(self._state.trainable(reduced.values))
        return reduced.norm(numel=self._state.trainable_numel)

    def _set_rates(self) -> float:
        factor = rate_factor(self.step, steps=self._steps, schedule=self._schedule)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_rate"] * factor
        return self._settings.learning_rate * factor

    def restore(self, step: int, *, applied_steps: int) -> None:
        """Continue after `step` steps, of which `applied_steps` reached the optimizer."""
        self.step = step
        for optimizer in self._optimizers:
            for own in optimizer.state.values():
                if "step" in own:
                    own["step"].fill_(applied_steps)
