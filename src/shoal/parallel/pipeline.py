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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.models.anatomy import Anatomy, canonical_name, canonical_parameters
from shoal.parallel.local import Holdings, sharded_of
from shoal.parallel.mesh import Mesh
from shoal.parallel.settings import Settings
from shoal.plan.schedules import rank_of_stage

_BEFORE = -1
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
        if home == _BEFORE:
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
    _homes: dict[str, set[int]] = field(default_factory=dict)
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
        return [each for name, each in named.items() if any(map(stage.has, self._homes[name]))]


def own_blocks(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The blocks that this rank has, in their order."""
    paths = (anatomy.blocks, *anatomy.more_blocks)
    found = (block for path in paths for block in model.get_submodule(path).children())
    return [block for block in found if not isinstance(block, Absent)]


def apply_pipeline(
    model: nn.Module, anatomy: Anatomy, mesh: Mesh, holdings: Holdings, settings: Settings
) -> Holdings:
    """Leave `model` (meta or real) the stages of this rank, in place; nothing for a degree of 1.

    Raises ModelError for a model that has fewer blocks than stages, or parts nobody can place.
    """
    degree = mesh.degree("pipeline")
    if degree == 1:
        return holdings
    homes = _homes_of(model, anatomy)
    every = stages_of(model, anatomy, homes, settings=settings, degree=degree)
    ranks = tuple(
        rank_of_stage(settings.schedule, stage=each.number, ranks=degree) for each in every
    )
    stages = Stages(every, ranks, mesh.coordinate("pipeline"))
    mesh.ends()  # collective: the stages in between have nothing to sum, and make the group too
    names = {name: (name,) for name in homes}
    names |= {name: group for group in anatomy.ties for name in group}
    stages._homes = {name: {homes[each] for each in group} for name, group in names.items()}
    kept = {n for n, at in stages._homes.items() if any(s.has(h) for s in stages.own for h in at)}
    _leave(model, anatomy, stages, homes=homes, kept=kept)
    sharded_of(model).stages = stages
    changes: dict[str, dict[str, Any]] = {}
    for name in holdings:
        at = {rank for s, rank in zip(every, ranks) if any(map(s.has, stages._homes[name]))}
        if len(at) > 1 and at != {ranks[0], ranks[-1]}:
            raise ModelError(f"{name}: is tied between stages that are not the first and the last")
        if len(at) > 1:
            both = frozenset({"pipeline"})
            changes[name] = {"copies": both, "partial": both}
    return holdings.changed(changes).only(kept)


def stages_of(
    model: nn.Module,
    anatomy: Anatomy,
    homes: dict[str, int],
    *,
    settings: Settings,
    degree: int,
) -> tuple[Stage, ...]:
    """All stages: as `settings.split` says, else so that the dearest is as cheap as it can be."""
    count = degree * settings.stages_per_rank
    num_blocks = len(list(model.get_submodule(anatomy.blocks).children()))
    if anatomy.more_blocks:
        raise ModelError(f"{anatomy.family}: an encoder and a decoder are not cut into stages")
    sizes = list(settings.split or ())
    if not sizes:
        costs = _costs(model, homes)
        first, *blocks, last = (costs.get(at, 0.0) for at in range(_BEFORE, num_blocks + 1))
        sizes = balanced(blocks, count, first=first, last=last)
    if len(sizes) != count or sum(sizes) != num_blocks or min(sizes) < 1:
        raise ModelError(
            f"parallel.pipeline.split: expected {count} numbers that add up to {num_blocks} "
            f"blocks, got {sizes}"
        )
    starts = [sum(sizes[:at]) for at in range(count + 1)]
    return tuple(Stage(at, count, starts[at], starts[at + 1]) for at in range(count))


def balanced(costs: Sequence[float], parts: int, *, first: float, last: float) -> list[int]:
    """Blocks of each of `parts` stages: of contiguous splits the one whose dearest stage is
    cheapest, then the most even.

    `costs` of each block; `first` and `last`: what the ends have besides. Raises ModelError for
    more parts than blocks.
    """
    count = len(costs)
    if parts > count:
        raise ModelError(f"{parts} stages for {count} blocks: a stage would be empty")
    upto = [sum(costs[:at]) for at in range(count + 1)]

    def cost(start: int, stop: int, part: int) -> float:
        ends = (first if part == 0 else 0.0) + (last if part == parts - 1 else 0.0)
        return upto[stop] - upto[start] + ends

    # best[stop]: (cost of the dearest, sum of squares, sizes) of the first stages up to `stop`
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for part in range(parts):
        found: dict[int, tuple[float, float, list[int]]] = {}
        for stop in range(part + 1, count - (parts - 1 - part) + 1):
            options = [
                (max(top, each), squares + each**2, [*sizes, stop - start])
                for start, (top, squares, sizes) in best.items()
                if start < stop
                for each in [cost(start, stop, part)]
            ]
            found[stop] = min(options)
        best = found
    return best[count][2]


def _costs(model: nn.Module, homes: dict[str, int]) -> dict[int, float]:
    """Multiply-adds of one token by home.

    A table that is looked up costs its width; of experts those count that a token meets.
    """
    met = getattr(model.config, "num_experts_per_tok", None)
    costs = dict.fromkeys(homes.values(), 0.0)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        home, shape, each = homes[canonical_name(name)], parameter.shape, parameter.numel()
        if home == _BEFORE and len(shape) == 2:
            each = shape[1]
        elif met is not None and len(shape) == 3:
            each = each * met / shape[0]
        costs[home] += each
    return costs


def _homes_of(model: nn.Module, anatomy: Anatomy) -> dict[str, int]:
    """Home of every parameter by each of its names: before the blocks, a block's number, after."""
    after = len(list(model.get_submodule(anatomy.blocks).children()))
    inside = f"{anatomy.base}." if anatomy.base else ""
    order = [path for path, _ in model.named_modules()]
    blocks = order.index(anatomy.blocks)
    homes = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        name = canonical_name(name)
        path = name.rpartition(".")[0]
        if path.startswith(anatomy.blocks + "."):
            homes[name] = int(path[len(anatomy.blocks) + 1 :].partition(".")[0])
        elif not name.startswith(inside) or path == anatomy.norm or order.index(path) > blocks:
            homes[name] = after
        else:
            homes[name] = _BEFORE
    return homes


def _leave(
    model: nn.Module, anatomy: Anatomy, stages: Stages, *, homes: dict[str, int], kept: set[str]
) -> None:
    """Take out of the tree what no stage of this rank has, and note where all parts hang."""
    blocks = model.get_submodule(anatomy.blocks)
    for number, block in enumerate(list(blocks.children())):
        _place(stages, blocks, str(number), block, home=number)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path == anatomy.blocks or path.startswith(anatomy.blocks + "."):
            continue
        for leaf in list(module._parameters):
            name = f"{path}.{leaf}" if path else leaf
            if name in homes and name not in kept:
                module._parameters[leaf] = None
        if any(homes.get(f"{path}.{leaf}") == _BEFORE for leaf in module._parameters):
            if list(module.children()):
                raise ModelError(f"{path}: no rule says in which stage its parameters belong")
            parent, _, leaf = path.rpartition(".")
            _place(stages, model.get_submodule(parent), leaf, module, home=_BEFORE)


def _place(stages: Stages, parent: nn.Module, name: str, module: nn.Module, *, home: int) -> None:
    absent = Absent(module, home=home, edges=stages._edges)
    present: nn.Module | None = module
    if not any(each.has(home) for each in stages.own):
        for leaf, tied in module._parameters.items() if home == _BEFORE else ():
            absent.register_parameter(leaf, tied)
        parent._modules[name], present = absent, None
    stages._places.append(_Place(parent, name, home, present, absent))
