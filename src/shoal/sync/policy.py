"""The protocol of policies: how replicas agree. The only part that knows the replicate axis."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from shoal.comm.flat import CHUNK, FlatLayout, Span, Vector, chunk_squares, ordered_sum
from shoal.comm.group import Group
from shoal.comm.tree import Node
from shoal.layout import Share, split_evenly


@dataclass(frozen=True)
class Division:
    """How a global batch is divided between replicas: in whole micro batches of all shards."""

    global_batch_samples: int
    micro_batch_samples: int
    shards: int = 1

    def share(self, rank: int, size: int) -> Share:
        """The part of replica `rank` of `size`."""
        multiple = self.micro_batch_samples * self.shards
        return split_evenly(self.global_batch_samples, size, rank, multiple=multiple)


@dataclass(frozen=True)
class Gradients:
    """What one replica has summed in a step: a flat vector, or (exact mode) nodes of the tree."""

    flat: Tensor
    layout: FlatLayout
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Reduced:
    """The part `span` of the gradient to apply: `values` holds these elements only."""

    span: Span
    values: Tensor
    group: Group | None = None
    """Those who have the other parts; None: it is whole."""

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


class Policy(ABC):
    """One rank's part in how replicas agree.

    `peers`: one rank of each replica, at this rank's position. `together`: the ranks that take a
    step as one, that is, that count targets, vote and skip together.
    """

    peers: Group
    together: Group
    alone = False
    """Whether a step is a replica's own matter: `together` is the replica."""
    keeps_equal_state: ClassVar[bool] = False
    """Whether all replicas have the same optimizer state."""

    def __init__(self, division: Division) -> None:
        self.division = division

    @classmethod
    @abstractmethod
    def of(cls, section: Any, given: Given) -> Policy:
        """The policy of a recipe's section (config/sync.py)."""

    def enter(self, *, world: Group, peers: Group, inside: Group) -> None:
        """Stand among the ranks of a generation. `inside`: the ranks of this replica."""
        self.peers, self.together = peers, inside if self.alone else world

    def share(self) -> Share:
        """The part of every global batch that this replica computes."""
        return self.division.share(self.peers.rank, self.peers.size)

    def owned(self, layout: FlatLayout, *, numel: int) -> Span:
        """The part of the first `numel` elements that this rank updates."""
        return Span(0, numel)

    def before_step(self, step: int) -> None:
        """Called before step `step` (from 0). Raises PeersLost; may be called again then."""
        return

    @abstractmethod
    def reduce(self, gradients: Gradients) -> Reduced:
        """The gradient that a step applies; `gradients` may be overwritten. Raises PeersLost."""

    def after_step(self, step: int, *, targets: int) -> None:
        """Called after step `step` was applied, which had `targets`. Raises PeersLost.

        What it could not do for a lost peer, `before_step` does later.
        """
        return

    def equal_after(self, step: int) -> bool:
        """Whether all replicas hold the same parameters, bit for bit, after `step` steps."""
        return True

    def vectors(self) -> Iterable[Vector]:
        """Its own state, laid out as the parameters are."""
        return ()

    def facts(self) -> dict[str, Any]:
        """This rank's state besides vectors; JSON-able."""
        return {}

    def begin(self, step: int) -> None:
        """All replicas hold the same parameters now, after `step` steps."""
        return

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Stand where `facts` say."""
        return

    def close(self) -> None:
        """Give up what it holds besides memory."""
        return
