"""Divides the blocks of a replica into the stages of a pipeline (parallel/stages.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from shoal.errors import ModelError
from shoal.models.anatomy import Anatomy, canonical_name
from shoal.parallel.local import Holdings, sharded_of
from shoal.parallel.mesh import Mesh
from shoal.parallel.settings import Settings
from shoal.parallel.stages import BEFORE, Stage, Stages
from shoal.plan.schedules import rank_of_stage


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
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in homes}
    names |= {name: group for group in anatomy.ties for name in group}
    stages.homes = {name: {homes[each] for each in group} for name, group in names.items()}
    kept = {n for n, at in stages.homes.items() if any(s.has(h) for s in stages.own for h in at)}
    _leave(model, anatomy, stages, homes=homes, kept=kept)
    sharded_of(model).stages = stages
    changes: dict[str, dict[str, Any]] = {}
    for name in holdings:
        at = {rank for s, rank in zip(every, ranks) if any(map(s.has, stages.homes[name]))}
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
        first, *blocks, last = (costs.get(at, 0.0) for at in range(BEFORE, num_blocks + 1))
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
        if home == BEFORE and len(shape) == 2:
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
            homes[name] = BEFORE
    return homes


def _leave(
    model: nn.Module, anatomy: Anatomy, stages: Stages, *, homes: dict[str, int], kept: set[str]
) -> None:
    """Take out of the tree what no stage of this rank has, and note where all parts hang."""
    blocks = model.get_submodule(anatomy.blocks)
    for number in range(len(list(blocks.children()))):
        stages.place(blocks, str(number), home=number)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path == anatomy.blocks or path.startswith(anatomy.blocks + "."):
            continue
        for leaf in list(module._parameters):
            name = f"{path}.{leaf}" if path else leaf
            if name in homes and name not in kept:
                module._parameters[leaf] = None
        if any(homes.get(f"{path}.{leaf}") == BEFORE for leaf in module._parameters):
            if list(module.children()):
                raise ModelError(f"{path}: no rule says in which stage its parameters belong")
            parent, _, leaf = path.rpartition(".")
            stages.place(model.get_submodule(parent), leaf, home=BEFORE)
