"""Planned mistakes: what strategies get wrong in the field, made on purpose to show they are seen.

For proofs and tests only (`shoal parity --plant`); each is made on the objects of a run after they
were built. `mean-of-means` is made in engine/step.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shoal.comm.flat import Span
from shoal.comm.group import ProcessGroup
from shoal.errors import ConfigError, Problem, nearest
from shoal.parallel import held
from shoal.sync.every_step import Reduced

if TYPE_CHECKING:
    from shoal.engine.build import Training


def _without_reduction(training: Training) -> None:
    """No sum over replicas, nor over the tensor axis."""

    def reduce(gradient: Tensor, layout: Any) -> Reduced:
        return Reduced(Span(0, gradient.numel()), gradient)

    training.sync.reduce = reduce  # type: ignore[method-assign]
    training.replica.finish_gradients = lambda: None  # type: ignore[method-assign]


def _doubled_reduction(training: Training) -> None:
    """Sums over replicas and over the tensor axis, twice."""
    once, finish = training.sync.reduce, training.replica.finish_gradients

    def reduce(gradient: Tensor, layout: Any) -> Reduced:
        return once(once(gradient, layout).values, layout)

    def finish_twice() -> None:
        finish()
        finish()

    training.sync.reduce = reduce  # type: ignore[method-assign]
    training.replica.finish_gradients = finish_twice  # type: ignore[method-assign]


def _averaged_over_replicas(training: Training) -> None:
    """A mean over replicas where the sum belongs."""
    once = training.sync.reduce

    def reduce(gradient: Tensor, layout: Any) -> Reduced:
        found = once(gradient, layout)
        found.values.div_(training.ranks.num_parts)
        return found

    training.sync.reduce = reduce  # type: ignore[method-assign]


def _same_shards(training: Training) -> None:
    """Every rank of a replica begins with the values of the first (DTensor's own init on CPU)."""
    group = training.ranks.mesh.group(*held.REPLICA)
    if group is not None:
        ProcessGroup(group).broadcast_(training.state.values)


def _lost_tie(training: Training) -> None:
    """The head has a copy of the embedding that is its own."""
    names = next((group for group in training.anatomy.ties), None)
    if names is None:
        raise ConfigError([Problem("fault", "lost-tie: this model has no tied parameters")])
    for name in names[1:]:
        path, _, leaf = name.rpartition(".")
        module = training.model.get_submodule(path)
        shared = module._parameters[leaf]
        assert shared is not None, f"{name}: tied to nothing"
        module._parameters[leaf] = nn.Parameter(held.local(shared).clone())


def _missing_partial(training: Training) -> None:
    """The gradients of norms stay partial sums over the tensor axis."""
    placed = held.placed_of(training.model)
    placed.partial = tuple(name for name in placed.partial if "norm" not in name.lower())


MISTAKES: dict[str, Callable[[Training], None]] = {
    "mean-of-means": lambda training: None,
    "no-reduction": _without_reduction,
    "double-reduction": _doubled_reduction,
    "mean-for-sum": _averaged_over_replicas,
    "same-shards": _same_shards,
    "lost-tie": _lost_tie,
    "missing-partial": _missing_partial,
}


@torch.no_grad()
def make(name: str, training: Training) -> None:
    """Make the mistake `name`. Raises ConfigError for one that nobody knows."""
    if name not in MISTAKES:
        raise ConfigError([Problem("fault", f"unknown mistake {name!r}", nearest(name, MISTAKES))])
    MISTAKES[name](training)
