"""Two recorded runs beside each other: how far apart losses, gradients, norms and weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.checkpoint.store import Reader, Store
from shoal.engine.instruments.recorder import FOLDER
from shoal.observe.events import read_lines

SMALL = 1e-6
"""A gradient counts as at least this share of the norm of all: the true gradient of a
key's bias is zero, and what is left there is rounding."""


@dataclass(frozen=True)
class Recording:
    """What a run with `record` left behind."""

    run: Path

    @property
    def losses(self) -> list[float]:
        """Loss of each step."""
        return [row["loss"] for row in read_lines(self.run / "metrics.jsonl") if "loss" in row]

    @property
    def num_steps(self) -> int:
        """Steps recorded."""
        return len(self._store.steps())

    @property
    def _store(self) -> Store:
        return Store(self.run / FOLDER)

    def step(self, number: int) -> Reader:
        """Parameters before step `number` (from 0), and its gradients."""
        return self._store.open(number)

    def facts(self, number: int) -> dict[str, Any]:
        """What the recorder noted besides tensors."""
        return self.step(number).state

    @property
    def last(self) -> Reader:
        """The checkpoint after the last step."""
        store = Store(self.run / "checkpoints")
        return store.open(store.steps()[-1])


@dataclass
class Figures:
    """How far one run is from another. Lists are by step, dicts by canonical name.

    `gradients[step][name]` and `parameters[name]`: |difference| / max(|wanted|, 1e-6 |all|), norms
    over the elements of a tensor.
    """

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, float]] = field(default_factory=list)
    parameters: dict[str, float] = field(default_factory=dict)
    begins_equal: bool = True
    """Whether the initial parameters are the same bits."""


def figures_of(found: Recording, wanted: Recording) -> Figures:
    """Compare all that was recorded."""
    steps = range(min(found.num_steps, wanted.num_steps))
    norms = [(found.facts(n)["norm"], wanted.facts(n)["norm"]) for n in steps]
    result = Figures(
        losses=[relative(a, b) for a, b in zip(found.losses, wanted.losses)],
        norms=[relative(a, b) for a, b in norms],
    )
    for number in steps:
        ours, theirs = found.step(number), wanted.step(number)
        result.gradients.append(ratios(_pairs(ours, theirs, kind="gradient")))
    first, other = found.step(0), wanted.step(0)
    result.begins_equal = all(
        torch.equal(a.double(), b.double()) for _, a, b in _pairs(first, other, kind="parameter")()
    )
    result.parameters = ratios(_pairs(found.last, wanted.last, kind="parameter"))
    return result


Pairs = Callable[[], Iterator[tuple[str, Tensor, Tensor]]]


def _pairs(found: Reader, wanted: Reader, *, kind: str) -> Pairs:
    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        for name in wanted.names(kind):
            yield name, found.read(name, kind=kind), wanted.read(name, kind=kind)

    return pairs


def ratios(pairs: Pairs) -> dict[str, float]:
    """Name -> how far the first of each pair is from the second."""
    apart = {name: (_norm(a.double() - b.double()), _norm(b)) for name, a, b in pairs()}
    whole = sum(size**2 for _, size in apart.values()) ** 0.5
    return {
        name: difference / max(size, SMALL * whole, 1e-300)
        for name, (difference, size) in apart.items()
    }


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def relative(found: float, wanted: float) -> float:
    """|found - wanted| / |wanted|; NaN counts as infinitely far."""
    distance = abs(found - wanted) / max(abs(wanted), 1e-300)
    return distance if distance == distance else float("inf")
