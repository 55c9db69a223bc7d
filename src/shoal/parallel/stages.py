"""Stages of a pipeline: a rank keeps the blocks of its own, and the model's own forward runs them.

A model's list of blocks keeps its full length, for forwards read `layer_types` and the like by
index. What another stage has is `Absent`: hidden states enter a stage in the place of the block
before its first, so that nothing computed earlier matters (Granite multiplies embeddings, GPT-2
adds positions), and leave it in the place of the block after its last, so that nothing later runs.
Parameters keep their names. One that is tied between the ends is kept by both.

A rank may have several stages: one tree of modules, of which one stage's are in place at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.models.anatomy import Anatomy, canonical_parameters

BEFORE = -1
"""Home of what runs before the blocks; a block's is its number, and what runs after them comes
next."""


@dataclass(frozen=True)
class Stage:
    """Blocks `start` up to `stop`; the first of `count` stages also has the embedding, the last
    the norm and the head."""

    number: int
    count: int
    start: int
    stop: int

    @property
    def is_first(self) -> bool:
        """Whether it reads tokens."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the loss."""
        return self.number == self.count - 1

    def has(self, home: int) -> bool:
        """Whether what belongs at `home` runs in this stage."""
        if home == BEFORE:
            return self.is_first
        return self.start <= home < self.stop or (self.is_last and home >= self.stop)


class Left(Exception):
    """The hidden states have come to the end of a stage: the rest of the forward is another's."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass
class _Edges:
    """The stage that a forward is in, and what it began with."""

    stage: Stage | None = None
    hidden: Tensor | None = None


class Absent(nn.Module):
    """Stands where a module is that another stage runs; keeps a parameter that is tied to ours."""

    def __init__(self, away: nn.Module, *, home: int, edges: _Edges) -> None:
        super().__init__()
        self._home, self._edges = home, edges
        self._width: int | None = getattr(away, "embedding_dim", None)

    def forward(self, given: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Before the stage: of the right shape, and not read by anybody."""
        stage, hidden = self._edges.stage, self._edges.hidden
        assert stage is not None, "a model that is cut into stages runs stage by stage"
        if self._home == stage.stop:
            raise Left(given)
        if hidden is None or self._home >= stage.start:
            return given
        if self._home == stage.start - 1:
            return hidden
        return given if self._width is None else hidden.new_zeros(*given.shape, self._width)


@dataclass
class _Place:
    """Where a module of `home` hangs; `present` None: no stage of this rank has it."""

    parent: nn.Module
    name: str
    home: int
    present: nn.Module | None
    absent: Absent


@dataclass
class Stages:
    """The stages of one rank, and which ranks have the others."""

    every: tuple[Stage, ...]
    ranks: tuple[int, ...]
    """Coordinate along pipeline of the rank that has each stage."""
    coordinate: int
    _places: list[_Place] = field(default_factory=list)
    _edges: _Edges = field(default_factory=_Edges)
    homes: dict[str, set[int]] = field(default_factory=dict)
    """Of every parameter, by canonical name; a tied one may have several."""

    @property
    def own(self) -> tuple[Stage, ...]:
        """This rank's, in the order that a micro batch passes them."""
        return tuple(s for s, rank in zip(self.every, self.ranks) if rank == self.coordinate)

    @property
    def speaks_at(self) -> int:
        """Coordinate of the rank that has the loss."""
        return self.ranks[-1]

    def run(self, stage: Stage, hidden: Tensor | None, forward: Callable[[], Tensor]) -> Tensor:
        """What `forward` gives in the last stage, else the hidden states after the stage's blocks.

        `forward` runs the whole model; `hidden`: what the stage before gave, None in the first.
        """
        with self._in_place(stage, hidden):
            try:
                result = forward()
            except Left as left:
                return left.hidden
        if not stage.is_last:
            raise ModelError(
                f"stage {stage.number}: the forward did not pass block {stage.stop} of its list"
            )
        return result

    def place(self, parent: nn.Module, name: str, *, home: int) -> None:
        """Note a module that hangs in `parent`, and take it out if no stage here has it.

        One before the blocks is then still there for a parameter that is tied to one of ours.
        """
        module = parent._modules[name]
        assert module is not None, f"{name}: nothing hangs there"
        absent = Absent(module, home=home, edges=self._edges)
        present: nn.Module | None = module
        if not any(each.has(home) for each in self.own):
            for leaf, tied in module._parameters.items() if home == BEFORE else ():
                absent.register_parameter(leaf, tied)
            parent._modules[name], present = absent, None
        self._places.append(_Place(parent, name, home, present, absent))

    @contextlib.contextmanager
    def _in_place(self, stage: Stage, hidden: Tensor | None) -> Iterator[None]:
        """The modules of `stage` in the tree, and of no other stage."""
        self._edges.stage, self._edges.hidden = stage, hidden
        others = [each for each in self._places if each.present and not stage.has(each.home)]
        for each in others:
            each.parent._modules[each.name] = each.absent
        try:
            yield
        finally:
            for each in others:
                each.parent._modules[each.name] = each.present
            self._edges.stage = self._edges.hidden = None

    def blocks(self, stage: Stage) -> list[nn.Module]:
        """The blocks of one of this rank's stages."""
        inside = [each for each in self._places if stage.start <= each.home < stage.stop]
        return [each.present for each in inside if each.present is not None]

    def parameters(self, model: nn.Module, stage: Stage) -> list[nn.Parameter]:
        """The parameters that `stage` has, once each."""
        named = canonical_parameters(model)
        return [each for name, each in named.items() if any(map(stage.has, self.homes[name]))]


def own_blocks(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The blocks that this rank has, in their order."""
    paths = (anatomy.blocks, *anatomy.more_blocks)
    found = (block for path in paths for block in model.get_submodule(path).children())
    return [block for block in found if not isinstance(block, Absent)]
