"""The state of training: parameters, gradients and optimizer moments as views of flat vectors.

Parameters of the model are made views of one vector, so that a reduction is one sum, the update
is one kernel per region, and threads share a single copy. Regions: `matrices` (Muon), `decay`,
`plain` (no decay), `frozen` (no gradient).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from shoal.boxes import Box, Slot
from shoal.comm.flat import FlatLayout
from shoal.comm.group import Group
from shoal.config.recipe import Muon, OptimizerSection
from shoal.errors import ConfigError, Problem, nearest
from shoal.layout import Layout
from shoal.parallel.held import Piece, all_slots, placed_of

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("exp_avg", "exp_avg_sq", "momentum_buffer")}
"""Optimizer states by kind of optimizer, by torch's own names."""


def regions_of(
    shapes: Mapping[str, Sequence[int]],
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
    for name, shape in shapes.items():
        if name in still:
            region = "frozen"
        elif name in muon:
            region = "matrices"
        else:
            region = "decay" if name in decay else "plain"
        regions[region][name] = tuple(shape)
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
    """All tensors of training on one rank. `gradients` covers the trainable regions only.

    `shapes`: the parameters' global ones. `slots`: the boxes of them that this rank has. `cut`: how
    the replica is divided, and `cut_names`: which names along tensor (the others are whole there).
    """

    layout: FlatLayout
    values: Tensor
    gradients: Tensor
    moments: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    slots: dict[str, list[Slot]] = field(default_factory=dict)
    cut: Layout = field(default_factory=Layout)
    cut_names: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.slots:
            self.shapes = dict(self.layout.shapes)
            whole = ((name, Box.whole(shape)) for name, shape in self.shapes.items())
            self.slots = {name: [Slot(box, box.offsets)] for name, box in whole}

    @property
    def trainable_numel(self) -> int:
        """Elements of the vector that have a gradient (the frozen region is last)."""
        return self.layout.regions["frozen"].start

    def trainable(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> view of `flat`, a vector of the trainable regions such as the gradients."""
        frozen = self.layout.members["frozen"]
        return {n: self.layout.view(flat, n) for n in self.layout.shapes if n not in frozen}

    def zero_gradients(self) -> None:
        """Forget the gradients."""
        self.gradients.zero_()

    def has_moment(self, kind: str, name: str) -> bool:
        """Whether parameter `name` has the optimizer state `kind`."""
        members = self.layout.members
        if name in members["frozen"]:
            return False
        return kind == "gradient" or (kind == "momentum_buffer") == (name in members["matrices"])

    def pieces(self, kind: str) -> dict[str, list[Piece]]:
        """`parameter`, or an optimizer state: name -> the boxes of it on this rank."""
        return {
            name: [Piece(slot.box, slot.of(storage)) for slot in self.slots[name]]
            for name, storage in self.named(kind).items()
        }

    def named(self, kind: str) -> dict[str, Tensor]:
        """`parameter`, or an optimizer state: name -> view of this rank's storage."""
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
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
) -> FlatState:
    """Zeroed vectors for `regions`. Threads share values and moments; gradients are each rank's.

    `model`: one that was cut (parallel/apply.py), whose storage the regions describe; without it
    every tensor is whole. `dtype`: float64 for proofs, which want to know what rounding does.
    """
    layout = FlatLayout.of(regions, whole=["matrices"] if isinstance(optimizer, Muon) else [])
    values = group.buffer(layout.numel, dtype=dtype, device=device)
    trainable = layout.regions["frozen"].start
    gradients = torch.zeros(trainable, dtype=dtype, device=device)
    moments = {
        kind: group.buffer(trainable, dtype=dtype, device=device)
        for kind in MOMENTS[optimizer.kind]
    }
    state = FlatState(layout, values, gradients, moments)
    if model is not None:
        placed = placed_of(model)
        state.shapes = {name: each.shape for name, each in placed.cuts.items()}
        state.slots = all_slots(model)
        state.cut = replace(placed.mesh.layout, replicate=1)
        state.cut_names = frozenset(n for n, each in placed.cuts.items() if each.dim is not None)
    return state


@dataclass
class Progress:
    """Where a run is: everything besides tensors that a checkpoint holds."""

    step: int = 0
    applied_steps: int = 0
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
