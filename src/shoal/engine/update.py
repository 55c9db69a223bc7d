"""One optimizer step: reduce, finite?, clip, rate, apply. All ranks come to the same outcome."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.comm.flat import CHUNK, Span, chunk_squares, ordered_sum
from shoal.config.recipe import AdamW, Muon, OptimizerSection, ScheduleSection
from shoal.engine.schedule import rate_factor
from shoal.engine.state import FlatState
from shoal.engine.step import StepResult, Word
from shoal.parallel.precision import LossScale
from shoal.sync.every_step import EveryStep, Reduced


@dataclass(frozen=True)
class Outcome:
    """What a step came to; the same on every rank."""

    loss: float
    gradient_norm: float
    learning_rate: float
    targets: int
    applied: bool
    word: Word
    read: list[int]
    norms: list[float]
    """Norm of each replica's own gradients; empty for one replica."""


@dataclass
class _Slot:
    """A parameter of the optimizer and the elements of the flat vector it stands for."""

    parameter: nn.Parameter
    span: Span
    shape: tuple[int, ...]


class Update:
    """Applies summed gradients to the part of the parameters that this rank owns."""

    def __init__(
        self,
        state: FlatState,
        *,
        sync: EveryStep,
        optimizer: OptimizerSection,
        schedule: ScheduleSection,
        steps: int,
        max_gradient_norm: float | None,
        cut_norm: Callable[[Tensor, FlatState], float] | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        """`cut_norm`: gives the norm of flat gradients where each rank has a part of a replica.

        `loss_scale`: by what the gradients were multiplied; changed after each step.
        """
        self._loss_scale = loss_scale
        self._state, self._sync, self._cut_norm = state, sync, cut_norm
        self._schedule, self._steps = schedule, steps
        self._limit = max_gradient_norm
        self._settings = optimizer
        self._owned = sync.owned(state.layout, numel=state.trainable_numel)
        self._slots: list[_Slot] = []
        self._optimizers = _build(state, self._owned, optimizer, self._slots)
        self.on_reduced: Callable[[int, Reduced, float], None] = lambda step, reduced, norm: None
        """Called with the number of the step, the summed gradients before clipping, their norm."""
        self.step = 0
        """Optimizer steps applied or skipped so far: what the schedule counts."""

    @torch.no_grad()
    def apply(self, result: StepResult) -> Outcome:
        """Reduce `result`'s gradients over replicas and apply them, unless they are not finite."""
        state = self._state
        if result.nodes:
            reduced = self._sync.reduce_tree(
                result.nodes, state.layout, num_grains=result.num_grains
            )
        else:
            reduced = self._sync.reduce(state.gradients, state.layout)
        if self._loss_scale is not None:
            reduced.values.div_(self._loss_scale.value)
        norm = self._norm(reduced)
        self.on_reduced(self.step, reduced, norm)
        self._sync.group.pulse.mark("apply")
        rate = self._set_rates()
        applied = math.isfinite(norm) and result.targets > 0
        if applied:
            if self._limit is not None and norm > self._limit:
                reduced.values.mul_(self._limit / (norm + 1e-6))
            for slot in self._slots:
                start, stop = slot.span.start - reduced.span.start, slot.span.stop
                part = reduced.values[start : stop - reduced.span.start]
                slot.parameter.grad = part.view(slot.shape)
            for optimizer in self._optimizers:
                optimizer.step()
        if self._loss_scale is not None and result.targets > 0:
            self._loss_scale.update(overflowed=not applied)
        self.step += 1
        return Outcome(
            loss=result.loss,
            gradient_norm=norm,
            learning_rate=rate,
            targets=result.targets,
            applied=applied,
            word=result.word,
            read=result.read,
            norms=result.norms,
        )

    def _norm(self, reduced: Reduced) -> float:
        """Of the summed gradients over the whole model; the same on every rank."""
        if self._cut_norm is not None:
            return self._cut_norm(reduced.values, self._state)
        squares = chunk_squares(reduced.values).cpu()
        whole = self._sync.total_of_chunks(
            squares,
            num_chunks=self._state.trainable_numel // CHUNK,
            first=reduced.span.start // CHUNK,
        )
        return math.sqrt(ordered_sum(whole.tolist()))

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


def _build(
    state: FlatState, owned: Span, settings: OptimizerSection, slots: list[_Slot]
) -> list[torch.optim.Optimizer]:
    """The optimizers over the owned elements; their states are views of the flat moments."""
    rate = settings.adamw_learning_rate if isinstance(settings, Muon) else settings.learning_rate
    groups = []
    moments: list[tuple[nn.Parameter, Span]] = []
    for region, decay in (("decay", settings.weight_decay), ("plain", 0.0)):
        span = state.layout.regions[region].meet(owned)
        if span is None:
            continue
        parameter = nn.Parameter(state.values[span.start : span.stop])
        slots.append(_Slot(parameter, span, (len(span),)))
        moments.append((parameter, span))
        groups.append({"params": [parameter], "weight_decay": decay, "peak_rate": rate})
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        adamw = torch.optim.AdamW(
            groups,
            lr=rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )
        for parameter, span in moments:
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": state.moments["exp_avg"][span.start : span.stop],
                "exp_avg_sq": state.moments["exp_avg_sq"][span.start : span.stop],
            }
        optimizers.append(adamw)
    if isinstance(settings, Muon):
        optimizers += _build_muon(state, owned, settings, slots)
    else:
        assert isinstance(settings, AdamW), f"an optimizer without a rule: {settings!r}"
    return optimizers


def _build_muon(
    state: FlatState, owned: Span, settings: Muon, slots: list[_Slot]
) -> list[torch.optim.Optimizer]:
    layout, parameters = state.layout, []
    buffers: list[tuple[nn.Parameter, Tensor]] = []
    for name in layout.members["matrices"]:
        start = layout.offsets[name]
        view = layout.view(state.values, name)
        span = Span(start, start + view.numel())
        if not owned.start <= start < owned.stop:
            continue
        parameter = nn.Parameter(view)
        slots.append(_Slot(parameter, span, layout.shapes[name]))
        parameters.append(parameter)
        buffers.append((parameter, layout.view(state.moments["momentum_buffer"], name)))
    if not parameters:
        return []
    muon = torch.optim.Muon(
        [{"params": parameters, "peak_rate": settings.learning_rate}],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )
    for parameter, buffer in buffers:
        muon.state[parameter] = {"momentum_buffer": buffer}
    return [muon]
