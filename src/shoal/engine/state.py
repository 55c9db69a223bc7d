"""The state of training on one rank: parameters, gradients and optimizer state as flat vectors.

Parameters of the model are views of one vector, so that a reduction is one sum, the update is one
kernel per region, and threads share a single copy. Regions: `matrices` (Muon), `decay`, `plain`
(no decay), `frozen` (no gradient).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.boxes import Piece, Slot
from shoal.comm.flat import FlatLayout, Vector
from shoal.comm.group import Group
from shoal.config.optimizers import Muon, OptimizerSection
from shoal.parallel import shard
from shoal.parallel.local import Holdings
from shoal.parallel.mesh import Mesh
from shoal.parallel.replica import Replica

TRAINABLE = frozenset({"matrices", "decay", "plain"})
ALL = TRAINABLE | {"frozen"}
_ADAM = dict.fromkeys(("exp_avg", "exp_avg_sq"), frozenset({"decay", "plain"}))
OPTIMIZER_STATES: dict[str, dict[str, frozenset[str]]] = {
    "adamw": _ADAM,
    "muon": {**_ADAM, "momentum_buffer": frozenset({"matrices"})},
    "sgd": {"momentum_buffer": frozenset({"decay", "plain"})},
}
"""Optimizer states by kind of optimizer, by torch's own names, and the regions that have them."""


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


@dataclass
class FlatState:
    """All tensors of training on one rank. `gradients` covers the trainable regions only.

    `vectors`: what is hashed, handed on, saved and resumed, by kind; the parameters first.
    """

    layout: FlatLayout
    gradients: Tensor
    vectors: dict[str, Vector]
    holdings: Holdings
    unsaved: frozenset[str] = frozenset()
    """Parameters that a checkpoint leaves out: frozen under adapters, they lie in their folder."""
    slots: dict[str, list[Slot]] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = {name: self.holdings[name].slots for name in self.layout.shapes}

    @property
    def values(self) -> Tensor:
        """The parameters, flat."""
        return self.vectors["parameter"].tensor

    @property
    def trainable_numel(self) -> int:
        """Elements of the vector that have a gradient (the frozen region is last)."""
        return self.layout.regions["frozen"].start

    def add(self, vectors: Iterable[Vector]) -> None:
        """More state to keep with the parameters, such as a policy's."""
        self.vectors |= {vector.kind: vector for vector in vectors}

    def beside(self, vectors: Iterable[Vector]) -> FlatState:
        """The same state with more that is kept for the moment, such as for a save."""
        more = {vector.kind: vector for vector in vectors}
        every = {**self.vectors, **more}
        return FlatState(self.layout, self.gradients, every, self.holdings, self.unsaved)

    def trainable(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> view of `flat`, a vector of the trainable regions such as the gradients."""
        return self.views(Vector("gradient", flat, TRAINABLE))

    def zero_gradients(self) -> None:
        """Forget the gradients."""
        self.gradients.zero_()

    def named(self, kind: str) -> dict[str, Tensor]:
        """Name -> view of this rank's storage of `kind` (`parameter`, or a state)."""
        return self.views(self.vectors[kind])

    def views(self, vector: Vector) -> dict[str, Tensor]:
        """Name -> view of `vector`, for the parameters that have it."""
        members = (self.layout.members[region] for region in vector.regions)
        known = frozenset[str]().union(*members)
        return {n: self.layout.view(vector.tensor, n) for n in self.layout.shapes if n in known}

    def saved(self, vector: Vector) -> dict[str, Tensor]:
        """The views of `vector` that a checkpoint holds."""
        return {n: each for n, each in self.views(vector).items() if n not in self.unsaved}

    def pieces(self, vector: Vector) -> Iterator[Piece]:
        """The boxes of `vector` that this rank has and a checkpoint holds, as views."""
        for name, storage in self.saved(vector).items():
            shape = self.holdings[name].shape
            for slot in self.slots[name]:
                yield Piece(name, vector.kind, shape, slot.box, slot.of(storage))

    def resident(self) -> list[Tensor]:
        """Parameters, gradients and everything kept with them."""
        return [self.gradients, *(vector.tensor for vector in self.vectors.values())]


def allocate(
    regions: dict[str, dict[str, tuple[int, ...]]],
    *,
    group: Group,
    optimizer: OptimizerSection,
    device: torch.device,
    holdings: Holdings | None = None,
    dtype: torch.dtype = torch.float32,
    equal: bool = True,
    unsaved: frozenset[str] = frozenset(),
) -> FlatState:
    """Zeroed vectors for `regions`. Threads share parameters and states; gradients are each rank's.

    `holdings`: of a model that was cut, whose storage the regions describe; without it every tensor
    is whole. `dtype`: float64 for proofs, which want to know what rounding does. `equal`: whether
    all replicas keep the same optimizer states. `unsaved`: what a checkpoint leaves out.
    """
    layout = FlatLayout.of(regions, whole=["matrices"] if isinstance(optimizer, Muon) else [])
    trainable = layout.regions["frozen"].start

    def vector(kind: str, numel: int, regions: frozenset[str], **more: Any) -> Vector:
        return Vector(kind, group.buffer(numel, dtype=dtype, device=device), regions, **more)

    vectors = [vector("parameter", layout.numel, ALL)]
    vectors += [
        vector(kind, trainable, where, equal=equal)
        for kind, where in OPTIMIZER_STATES[optimizer.kind].items()
        if kind != "momentum_buffer" or optimizer.momentum  # type: ignore[union-attr]
    ]
    return FlatState(
        layout,
        torch.zeros(trainable, dtype=dtype, device=device),
        {each.kind: each for each in vectors},
        holdings or Holdings.whole(Mesh.alone(device), layout.shapes),
        unsaved,
    )


def allocate_for(
    replica: Replica,
    *,
    group: Group,
    optimizer: OptimizerSection,
    dtype: torch.dtype,
    equal: bool = True,
    unsaved: frozenset[str] = frozenset(),
) -> FlatState:
    """The zeroed state of a model that was cut."""
    regions = regions_of(
        shard.storage_shapes(replica.model),
        decayed=replica.decayed,
        matrices=replica.matrices if isinstance(optimizer, Muon) else (),
        frozen=replica.frozen,
    )
    return allocate(
        regions,
        group=group,
        optimizer=optimizer,
        device=replica.sharded.storage_device,
        holdings=replica.holdings,
        dtype=dtype,
        equal=equal,
        unsaved=unsaved,
    )


@dataclass
class Progress:
    """Where a run is: everything besides tensors that a checkpoint holds."""

    step: int = 0
    applied_steps: int = 0
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
