"""Optimizers over what a rank owns of the flat state; their states are views of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm.flat import Span
from shoal.config.optimizers import SGD, AdamW, Muon, OptimizerSection
from shoal.engine import muon
from shoal.engine.state import FlatState
from shoal.parallel.whole import Wholes


@dataclass
class Owned:
    """A parameter of an optimizer, and the elements of the flat vector that it stands for."""

    parameter: nn.Parameter
    span: Span
    shape: tuple[int, ...]


def build_optimizers(
    state: FlatState, owned: Span, settings: OptimizerSection, *, compute: torch.dtype
) -> tuple[list[Owned], list[torch.optim.Optimizer]]:
    """The optimizers over `owned`, and what they step: one parameter per region, or per matrix.

    `compute`: of the run's matrix products.
    """
    groups: list[dict[str, Any]] = []
    flat: list[Owned] = []
    rate = settings.adamw_learning_rate if isinstance(settings, Muon) else settings.learning_rate
    for region, decay in (("decay", settings.weight_decay), ("plain", 0.0)):
        span = state.layout.regions[region].meet(owned)
        if span is None:
            continue
        each = Owned(nn.Parameter(state.values[span.start : span.stop]), span, (len(span),))
        flat.append(each)
        groups.append({"params": [each.parameter], "weight_decay": decay, "peak_rate": rate})
    optimizers: list[torch.optim.Optimizer] = []
    if groups and isinstance(settings, SGD):
        optimizers.append(_sgd(state, flat, groups, settings))
    elif groups:
        assert isinstance(settings, AdamW | Muon), f"an optimizer without a rule: {settings!r}"
        optimizers.append(_adamw(state, flat, groups, settings, rate=rate))
    if not isinstance(settings, Muon):
        return flat, optimizers
    wholes = _wholes(state)
    matrices = _matrices(state, owned)
    if matrices:  # before the others: it may need peers, who may be lost
        muons = _muon(state, matrices, settings, wholes=wholes, compute=compute)
        optimizers.insert(0, muons)
    return [*flat, *matrices.values()], optimizers


def _wholes(state: FlatState) -> Wholes | None:
    """Where matrices are cut; None where each is whole on this rank."""
    names = state.layout.members["matrices"]
    cut = any(state.layout.shapes[name] != state.holdings[name].shape for name in names)
    # a rank with nothing of a cut matrix has peers who count on it
    cut = cut or any(state.holdings[name].rows is not None for name in names)
    return Wholes(state.holdings, names) if cut else None


def _part(state: FlatState, kind: str, owned: Owned) -> Tensor:
    """The elements of a state that belong to a parameter, shaped alike; a view."""
    return state.vectors[kind].tensor[owned.span.start : owned.span.stop].view(owned.shape)


def _adamw(
    state: FlatState,
    flat: list[Owned],
    groups: list[dict[str, Any]],
    settings: AdamW | Muon,
    *,
    rate: float,
) -> torch.optim.Optimizer:
    adamw = torch.optim.AdamW(
        groups, lr=rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True
    )
    for each in flat:
        adamw.state[each.parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=each.parameter.device),
            "exp_avg": _part(state, "exp_avg", each),
            "exp_avg_sq": _part(state, "exp_avg_sq", each),
        }
    return adamw


def _sgd(
    state: FlatState, flat: list[Owned], groups: list[dict[str, Any]], settings: SGD
) -> torch.optim.Optimizer:
    sgd = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    for each in flat if settings.momentum else []:
        sgd.state[each.parameter] = {"momentum_buffer": _part(state, "momentum_buffer", each)}
    return sgd


def _matrices(state: FlatState, owned: Span) -> dict[str, Owned]:
    """The matrices of the blocks that begin in `owned`, by name; none goes on beyond it."""
    layout, found = state.layout, dict[str, Owned]()
    for name in layout.members["matrices"]:
        start, view = layout.offsets[name], layout.view(state.values, name)
        if owned.start <= start < owned.stop:
            span = Span(start, start + view.numel())
            found[name] = Owned(nn.Parameter(view), span, layout.shapes[name])
    return found


def _muon(
    state: FlatState,
    matrices: dict[str, Owned],
    settings: Muon,
    *,
    wholes: Wholes | None,
    compute: torch.dtype,
) -> torch.optim.Optimizer:
    parameters = [each.parameter for each in matrices.values()]
    made = muon.Muon(
        [{"params": parameters, "peak_rate": settings.learning_rate}],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        dtype=compute if compute == torch.bfloat16 else state.values.dtype,
        names=list(matrices),
        wholes=wholes,
    )
    for each in matrices.values():
        made.state[each.parameter] = {"momentum_buffer": _part(state, "momentum_buffer", each)}
    return made
