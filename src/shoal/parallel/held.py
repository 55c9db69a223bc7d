"""What of the model this rank holds: for every canonical name its boxes and their storage.

Checkpoints, optimizer state, norms and hashes work on these boxes and on plain local tensors; how a
replica is cut (tensor: by column, row, vocabulary or fused piece; shard: by rows of what tensor
left) is seen here only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# public by documentation, though its module is not: right for uneven shards (torch 2.13)
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from shoal.checkpoint.boxes import Box
from shoal.comm.flat import CHUNK, chunk_squares
from shoal.models.anatomy import canonical_parameters
from shoal.models.placement import Placement
from shoal.parallel.exchange import Exchange
from shoal.parallel.mesh import REPLICA, Mesh
from shoal.parallel.vocabulary import Vocabulary

_MARK = "shoal_placed"


@dataclass(frozen=True)
class Cut:
    """What the tensor axis left of one parameter: `segments` (start, size) of dim `dim`.

    They lie one after another in the local tensor; `dim` None: all of it.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    segments: tuple[tuple[int, int], ...] = ()


@dataclass
class Placed:
    """How `parallel.apply` cut a model; the model carries it."""

    mesh: Mesh
    cuts: dict[str, Cut]
    partial: tuple[str, ...] = ()
    """Names whose gradients are to be summed over the tensor axis after the last backward."""
    exchange: Exchange | None = None
    vocabulary: Vocabulary | None = None
    root: nn.Module | None = None
    """What FSDP2 calls its root (parallel/shard.py)."""
    offloaded: bool = False
    """Parameters, gradients and optimizer state live in CPU memory."""

    @property
    def storage_device(self) -> torch.device:
        """Where parameters are stored."""
        return torch.device("cpu") if self.offloaded else self.mesh.device


@dataclass(frozen=True)
class Slot:
    """One box of a parameter, and where in this rank's tensor it begins (per dim)."""

    box: Box
    begins: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `tensor`, which lies as the parameter's storage does; a view."""
        ends = (low + size for low, size in zip(self.begins, self.box.sizes))
        return tensor[tuple(slice(low, end) for low, end in zip(self.begins, ends))]


@dataclass(frozen=True)
class Piece:
    """One box of a parameter, and the part of the local tensor that is its storage."""

    box: Box
    tensor: Tensor = field(repr=False)


def mark(model: nn.Module, placed: Placed) -> None:
    """Let the model carry how it was cut."""
    object.__setattr__(model, _MARK, placed)


def placed_of(model: nn.Module) -> Placed:
    """How `model` was cut. Raises ValueError for one that `parallel.apply` has not seen."""
    placed = getattr(model, _MARK, None)
    if not isinstance(placed, Placed):
        raise ValueError(f"{type(model).__name__}: parallel.apply has not placed this model")
    return placed


def cut_of(placement: Placement, shape: Sequence[int], *, rank: int, degree: int) -> Cut:
    """The part of a parameter of global `shape` that rank `rank` of `degree` keeps.

    Every piece is divided as evenly as it can be; layers' pieces must divide (legal.py sees to it),
    a vocabulary need not.
    """
    if placement.dim is None or degree == 1:
        return Cut(tuple(shape))
    segments, start = [], 0
    for piece in placement.pieces or (shape[placement.dim],):
        low, high = piece * rank // degree, piece * (rank + 1) // degree
        segments.append((start + low, high - low))
        start += piece
    return Cut(tuple(shape), placement.dim, tuple(segments))


def local(tensor: Tensor) -> Tensor:
    """The plain tensor on this rank behind a parameter or gradient."""
    whole = tensor.detach()
    return whole.to_local() if isinstance(whole, DTensor) else whole


def held(model: nn.Module, *, gradients: bool = False) -> dict[str, list[Piece]]:
    """For every canonical name the boxes of the global parameter that this rank has, with storage.

    A name may have none (a small parameter over many ranks). `gradients`: of the gradients; names
    without one are left out. On a mesh every element of a replica is held by exactly one rank per
    coordinate of the axes that repeat it: see `counted`.
    """
    cuts = placed_of(model).cuts
    result = {}
    for name, parameter in canonical_parameters(model).items():
        tensor = parameter.grad if gradients else parameter
        if tensor is not None:
            result[name] = pieces_of(local(tensor), parameter, cuts[name])
    return result


def pieces_of(tensor: Tensor, parameter: Tensor, cut: Cut) -> list[Piece]:
    """The boxes of `tensor`, which lies on this rank as `parameter` does."""
    return [Piece(slot.box, slot.of(tensor)) for slot in slots_of(parameter, cut)]


def slots_of(parameter: Tensor, cut: Cut) -> list[Slot]:
    """The boxes of one parameter that this rank has, and where they lie in its storage."""
    first, rows = 0, tuple(parameter.shape)
    if isinstance(parameter, DTensor):
        rows, offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        first = offsets[0] if rows[0] else 0
    if not math.prod(rows):
        return []
    begins = [first] + [0] * (len(cut.shape) - 1) if cut.shape else []
    if cut.dim is None:
        return [Slot(Box(tuple(begins), tuple(rows)), (0,) * len(rows))]
    found, at = [], 0
    for start, size in cut.segments:
        # this segment is [at, at + size) of what the tensor axis left, of which we have [low, high)
        base = first if cut.dim == 0 else 0
        low = max(at, base)
        high = min(at + size, base + rows[cut.dim])
        if high > low:
            box = list(begins), list(rows)
            box[0][cut.dim], box[1][cut.dim] = start + low - at, high - low
            places = [0] * len(rows)
            places[cut.dim] = low - base
            found.append(Slot(Box(tuple(box[0]), tuple(box[1])), tuple(places)))
        at += size
    return found


def all_slots(model: nn.Module) -> dict[str, list[Slot]]:
    """`slots_of` every canonical parameter."""
    cuts = placed_of(model).cuts
    return {name: slots_of(each, cuts[name]) for name, each in canonical_parameters(model).items()}


def counted(model: nn.Module) -> frozenset[str]:
    """Names whose elements on this rank count in a sum over the replica.

    Cut ones always; whole ones on the first rank only of each axis that repeats them.
    """
    placed = placed_of(model)
    repeated = any(placed.mesh.coordinate(axis) for axis in ("context", "tensor"))
    return frozenset(
        name
        for name, cut in placed.cuts.items()
        if not repeated or (cut.dim is not None and not placed.mesh.coordinate("context"))
    )


@torch.no_grad()
def norm(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> float:
    """Euclidean norm over every element of the replica once: by one sum over all its axes.

    `tensors`: local tensors by canonical name, of which each rank has its part; None: gradients.
    Collective over the ranks of the replica, all of which get the same number.
    """
    placed, names = placed_of(model), counted(model)
    if tensors is None:
        parameters = canonical_parameters(model)
        tensors = {n: local(p.grad) for n, p in parameters.items() if p.grad is not None}
    total = torch.zeros((), dtype=torch.float64, device=placed.mesh.device)
    for square in _squares(each for name, each in tensors.items() if name in names):
        total += square
    group = placed.mesh.group(*REPLICA)
    if group is not None:
        dist.all_reduce(total, group=group)
    return float(total.sqrt())


def _squares(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    for each in tensors:
        if each.numel():
            yield squares_of(each).sum()


def squares_of(tensor: Tensor) -> Tensor:
    """Sums of squares over parts of `tensor`, float64: float32 adds up too few digits over all."""
    flat = tensor.reshape(-1)
    even = len(flat) // CHUNK * CHUNK
    rest = torch.linalg.vector_norm(flat[even:]).double().square()
    return torch.cat([chunk_squares(flat[:even]), rest[None]])


@torch.no_grad()
def sum_partial_gradients(model: nn.Module) -> None:
    """Sum over the tensor axis the gradients of which each rank has a part (the table's rule).

    Once a step, after the last backward. Collective over the tensor axis; without it nothing.
    """
    placed = placed_of(model)
    group = placed.mesh.group("tensor")
    if group is None or not placed.partial:
        return
    parameters = canonical_parameters(model)
    gradients = [
        local(gradient)
        for name in placed.partial
        if (gradient := parameters[name].grad) is not None
    ]
    if not gradients:
        return
    flat = torch.cat([each.reshape(-1) for each in gradients])
    dist.all_reduce(flat, group=group)
    at = 0
    for each in gradients:
        each.copy_(flat[at : at + each.numel()].view(each.shape))
        at += each.numel()
