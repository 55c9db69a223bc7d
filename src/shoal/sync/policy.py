"""The protocol of policies: how replicas agree. The only part that knows the replicate axis."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.comm.codec.compression import Note
from shoal.comm.flat import CHUNK, FlatLayout, Span, Vector, chunk_squares, ordered_sum
from shoal.comm.group import Group
from shoal.comm.tree import Node
from shoal.layout import Share
from shoal.sync.shares import Division, Shares


@dataclass(frozen=True)
class Gradients:
    """What one replica has summed in a step: a flat vector, or (exact mode) nodes of the tree."""

    flat: Tensor
    layout: FlatLayout
    nodes: list[Node] = field(default_factory=list)
    targets: int = 0
    """What the loss was divided by."""


@dataclass(frozen=True)
class Reduced:
    """The part `span` of the gradient to apply: `values` holds these elements only."""

    span: Span
    values: Tensor
    group: Group | None = None
    """Those who have the other parts; None: it is whole."""
    targets: int | None = None
    """Of all whose gradients are in it; None: of those who step together."""

    def norm(self, *, numel: int) -> float:
        """Euclidean norm of all `numel` elements; the same bits whoever has which part."""
        squares = chunk_squares(self.values).cpu()
        if self.group is not None:
            whole = torch.zeros(numel // CHUNK, dtype=torch.float64)
            first = self.span.start // CHUNK
            whole[first : first + squares.numel()] = squares
            self.group.sum_(whole)  # each element is one number and zeros: exact
            squares = whole
        return math.sqrt(ordered_sum(squares.tolist()))


@dataclass(frozen=True)
class Place:
    """Where a worker stands in a run whose replicas meet at parameter servers only."""

    replica: int
    replicas: int
    position: int
    """Of this worker inside its replica."""
    servers: Path
    """Folder with the keys and addresses of the servers."""
    optimizer: Any
    """The section train.optimizer."""
    rate: Callable[[int], float]
    """The schedule's factor on the learning rate at a step."""
    states: Mapping[str, Tensor]
    """This rank's optimizer states by name, laid out as the parameters."""
    say: Callable[[str], None]
    """Tell a person what is waited for."""


@dataclass(frozen=True)
class Given:
    """What a policy is built from besides its section of the recipe."""

    division: Division
    values: Tensor
    """This rank's flat parameters that are trained; the policy may change them in place."""
    layout: FlatLayout
    """Where each parameter lies in `values`."""
    steps: int
    """Of the whole run."""
    seed: int
    place: Place | None = None
    """Where this worker stands, for policies whose replicas meet nowhere else."""


def two_levels(peers: Group, within: int | None, *, world: Group) -> tuple[Group, Group] | None:
    """This rank's group of `within` neighbours, and one rank of each group, all at its place in it.

    None: all are one group, as after a loss that leaves a group without its like. Collective.
    Raises PeersLost.
    """
    rank, size = peers.rank, peers.size
    if within is None or size % within or size <= within:
        return None
    first = rank // within * within
    near = peers.part(range(first, first + within), world=world)
    return near, peers.part(range(rank % within, size, within), world=world)


class Policy(ABC):
    """One rank's part in how replicas agree.

    `peers`: one rank of each replica, at this rank's position. `together`: the ranks that take a
    step as one, that is, that count targets, vote and skip together.
    """

    peers: Group
    together: Group
    alone = False
    """Whether a step is a replica's own matter: `together` is the replica."""
    apart: ClassVar[bool] = False
    """Whether replicas meet at servers only: each is a world of its own, and the first one speaks
    for the run."""
    remember: Callable[[], dict[str, Any]] = dict
    """What a worker that takes this one's place must know besides tensors."""
    keeps_equal_state: ClassVar[bool] = False
    """Whether all replicas have the same optimizer state."""

    def __init__(self, division: Division) -> None:
        self.division, self.shares = division, Shares(division)

    @classmethod
    @abstractmethod
    def of(cls, section: Any, given: Given) -> Policy:
        """The policy of a recipe's section (config/sync.py)."""

    def enter(self, *, world: Group, peers: Group, inside: Group) -> None:
        """Stand among the ranks of a generation. `inside`: the ranks of this replica."""
        self.peers, self.together = peers, inside if self.alone else world
        self.shares.enter(peers.size)

    def share(self, step: int) -> Share:
        """The part of the global batch of `step` that this replica computes; it may be empty for
        a replica that steps by itself."""
        return self.shares.own(self.peers.rank, step, alone=self.alone)

    def owned(self, layout: FlatLayout, *, numel: int) -> Span:
        """The part of the first `numel` elements that this rank updates."""
        return Span(0, numel)

    def before_step(self, step: int) -> None:
        """Called before step `step` (from 0). Raises PeersLost; may be called again then."""
        return

    def buckets(self, *, numel: int) -> list[Span]:
        """Parts of the gradients whose reduction may begin before the others are known."""
        return []

    def begin_reduce(self, flat: Tensor) -> None:
        """Begin to reduce a bucket, whose gradients are in. Raises PeersLost.

        All peers do so in one order, for all buckets of a step or for none, before `reduce`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no buckets")

    @abstractmethod
    def reduce(self, gradients: Gradients) -> Reduced:
        """The gradient that a step applies; `gradients` may be overwritten. Raises PeersLost."""

    def after_step(self, step: int, *, targets: int) -> None:
        """Called after step `step` was applied, which had `targets`. Raises PeersLost.

        What it could not do for a lost peer, `before_step` does later.
        """
        return

    @property
    def round(self) -> int:
        """Of two ranks after the same step, the one with the higher number is further."""
        return 0

    def equal_after(self, step: int) -> bool:
        """Whether all replicas hold the same parameters, bit for bit, after `step` steps."""
        return True

    def meets_after(self, step: int) -> bool:
        """Whether all ranks meet after `step` steps: stops, saves and departures are agreed."""
        return self.equal_after(step)

    def vectors(self) -> Iterable[Vector]:
        """Its own state, laid out as the parameters are."""
        return ()

    def notes(self) -> list[Note]:
        """What happened since the last call, to be told as events (by rank 0)."""
        return []

    def facts(self) -> dict[str, Any]:
        """This rank's state besides vectors; JSON-able."""
        return {}

    def begin(self, step: int) -> None:
        """All replicas hold the same parameters now, after `step` steps."""
        return

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Stand where `facts` say."""
        return

    def figures(self) -> dict[str, float]:
        """What a row of metrics.jsonl tells of the step just taken."""
        return {}

    # --- of policies whose replicas are `apart`

    def arrive(self, step: int, *, brings: bool) -> tuple[int, dict[str, Any]]:
        """Join the run, which this rank would begin at `step`: the step to begin with, and what the
        worker before this one remembered. `brings`: this rank has the state of `step`."""
        return step, {}

    def account(self, step: int, read: Sequence[int]) -> None:
        """Note the digest of the samples that this replica has read for `step`, from 0."""
        return

    def accounted(self, *, last: bool) -> list[tuple[int, list[int]]]:
        """Digests of steps that all replicas have read, not given before; `last`: all the rest."""
        return []

    def gathered(self, *, last: bool) -> AbstractContextManager[None]:
        """Within it this rank has the run's whole state, to evaluate and save. `last`: once all
        replicas have done their last step."""
        return nullcontext()

    def finish(self) -> None:
        """Nothing follows from this replica."""
        return

    def ask_to_stop(self) -> None:
        """Let all replicas stop soon, each as early as nothing is lost by it (`ends_at`)."""
        return

    @property
    def ends_at(self) -> int | None:
        """The step after which this replica ends before the recipe does."""
        return None

    def close(self) -> None:
        """Give up what it holds besides memory."""
        return
