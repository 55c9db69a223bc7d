"""The state of training: parameters, gradients and optimizer moments as views of flat vectors.

Parameters of the model are made views of one vector, so that a reduction is one sum, the update
is one kernel per region, and threads share a single copy. Regions: `matrices` (Muon), `decay`,
`plain` (no decay), `frozen` (no gradient).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm.flat import FlatLayout
from shoal.comm.group import Group
from shoal.config.recipe import Muon, OptimizerSection
from shoal.errors import ConfigError, Problem, nearest

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("exp_avg", "exp_avg_sq", "momentum_buffer")}
"""Optimizer states by kind of optimizer, by torch's own names."""


def regions_of(
    parameters: Mapping[str, nn.Parameter],
    *,
    decayed: Iterable[str],
    matrices: Iterable[str],
    frozen: Iterable[str],
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Which region each parameter belongs to: region -> name -> shape, all names once."""
    decay, muon, still = set(decayed), set(matrices), set(frozen)
    regions: dict[str, dict[str, tuple[int, ...]]] = {
        "matrices": {},
        "decay": {},
        "plain": {},
        "frozen": {},
    }
    for name, parameter in parameters.items():
        if name in still:
            region = "frozen"
        elif name in muon:
            region = "matrices"
        else:
            region = "decay" if name in decay else "plain"
        regions[region][name] = tuple(parameter.shape)
    return regions


def frozen_names(names: Iterable[str], *, patterns: Iterable[str]) -> set[str]:
    """Names matched by the recipe's `train.freeze`. Raises ConfigError for an idle pattern."""
    known = list(names)
    frozen: set[str] = set()
    problems: list[Problem] = []
    for pattern in patterns:
        hits = set(fnmatch.filter(known, pattern))
        if not hits:
            hint = nearest(pattern.strip("*"), known)
            problems.append(Problem("train.freeze", f"{pattern!r} matches no parameter", hint))
        frozen |= hits
    if len(frozen) == len(known):
        problems.append(Problem("train.freeze", "every parameter is frozen; nothing to train"))
    if problems:
        raise ConfigError(problems)
    return frozen


@dataclass
class FlatState:
    """All tensors of training on one rank. `gradients` covers the trainable regions only."""

    layout: FlatLayout
    values: Tensor
    gradients: Tensor
    moments: dict[str, Tensor]

    @property
    def trainable_numel(self) -> int:
        """Elements of the vector that have a gradient (the frozen region is last)."""
        return self.layout.regions["frozen"].start

    def zero_gradients(self) -> None:
        """Forget the gradients."""
        self.gradients.zero_()

    def has_moment(self, kind: str, name: str) -> bool:
        """Whether parameter `name` has the optimizer state `kind`."""
        members = self.layout.members
        if name in members["frozen"]:
            return False
        return (kind == "momentum_buffer") == (name in members["matrices"])

    def named(self, kind: str) -> dict[str, Tensor]:
        """`parameter`, or an optimizer state: name -> view."""
        if kind == "parameter":
            return {name: self.layout.view(self.values, name) for name in self.layout.shapes}
        flat = self.moments[kind]
        return {
            name: self.layout.view(flat, name)
            for name in self.layout.shapes
            if self.has_moment(kind, name)
        }


def allocate(
    regions: dict[str, dict[str, tuple[int, ...]]],
    *,
    group: Group,
    optimizer: OptimizerSection,
    device: torch.device,
) -> FlatState:
    """Zeroed vectors for `regions`. Threads share values and moments; gradients are each rank's."""
    layout = FlatLayout.of(regions, whole=["matrices"] if isinstance(optimizer, Muon) else [])
    values = group.buffer(layout.numel, dtype=torch.float32, device=device)
    trainable = layout.regions["frozen"].start
    gradients = torch.zeros(trainable, dtype=torch.float32, device=device)
    moments = {
        kind: group.buffer(trainable, dtype=torch.float32, device=device)
        for kind in MOMENTS[optimizer.kind]
    }
    return FlatState(layout, values, gradients, moments)


@torch.no_grad()
def fill(state: FlatState, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the values of real `parameters` into the vector."""
    for name, parameter in parameters.items():
        state.layout.view(state.values, name).copy_(parameter)


@torch.no_grad()
def adopt(state: FlatState, parameters: Mapping[str, nn.Parameter]) -> None:
    """Make every parameter and its gradient a view of the vectors."""
    for name, parameter in parameters.items():
        parameter.data = state.layout.view(state.values, name)
        if name in state.layout.members["frozen"]:
            parameter.requires_grad_(False)
        else:
            parameter.grad = state.layout.view(state.gradients, name)


class StateSource:
    """Gives `models.init.materialise` the values that the vector already holds."""

    def __init__(self, state: FlatState) -> None:
        self._named = state.named("parameter")

    def tensor(self, name: str, *, box: Any = None) -> Tensor | None:
        """The value of a parameter, or None for a name that is none."""
        return self._named.get(name)


@dataclass
class Progress:
    """Where a run is: everything besides tensors that a checkpoint holds."""

    step: int = 0
    applied_steps: int = 0
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
