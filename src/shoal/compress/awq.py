"""Inputs of layers that matter are made larger before rounding, and what gives them smaller.

A column of a weight that meets large inputs loses less on the grid when it is scaled up; the layer
before is divided by the same numbers, so the model computes what it did (Lin et al.: AWQ, arXiv
2306.00978, section 3.2). The scales are s = a^r, a the mean size of an input, and r of 20 values in
[0, 1) the one with the least error on the calibration inputs (equations 4 and 5). As that error is
quadratic, it is computed from H = sum x x' alone: tr((Q(W s) / s - W) H (Q(W s) / s - W)').

What can be divided is found by trying: a norm before its layers, v before o, up before down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.compress.walk import Inputs, Seen, Walk, linear_layers
from shoal.models.adapter import matrix_of
from shoal.models.grid import Grid, nearest

_STEPS = 20
"""Of the exponent, as the paper's code has it."""
_LEAST = 1e-4
"""Of an input's mean size."""
_PAIRS = (("v_proj", "o_proj"), ("up_proj", "down_proj"))
_APART = 1e-3
"""How far a block may be off, over the size of its output, when it is divided and multiplied."""


@dataclass(frozen=True)
class Fold:
    """Layers that are multiplied, and the module that is divided."""

    layers: tuple[str, ...]
    """Linear layers that share their input."""
    before: str
    kind: str
    """`norm`; `norm+1`, whose weight is what its scale lacks to 1; `rows` of a linear layer."""
    repeat: int = 1
    """Inputs that one row gives (queries that share a value)."""
    size: int = 0
    """Of a head, where values are shared."""

    def shared(self, scales: Tensor) -> Tensor:
        """Scales [I] that are equal where inputs come from one row."""
        if self.repeat == 1:
            return scales
        parts = scales.view(-1, self.repeat, self.size).log().mean(1, keepdim=True).exp()
        return parts.expand(-1, self.repeat, -1).reshape(-1)

    def apply(self, model: nn.Module, scales: Tensor) -> None:
        """Divide and multiply, in place; `scales` [I] as `shared` gives them."""
        before = model.get_submodule(self.before)
        own = scales
        if self.repeat > 1:
            own = scales.view(-1, self.repeat, self.size)[:, 0].reshape(-1)
        bias = getattr(before, "bias", None)
        if self.kind == "rows":
            matrix_of(before).div_(own[:, None])
        elif self.kind == "norm":
            before.weight.div_(own)  # type: ignore[operator, union-attr]
        else:
            before.weight.add_(1).div_(own).sub_(1)  # type: ignore[operator, union-attr]
        if bias is not None:
            bias.div_(own)
        for path in self.layers:
            matrix_of(model.get_submodule(path)).mul_(scales)


def folds_of(model: nn.Module, walk: Walk, name: str) -> list[Fold]:
    """What of a block can be divided and multiplied: tried on one sample, weights as they were."""
    sample = walk.hidden[0][:1]
    wanted = walk.run_one(name, sample)
    found: list[Fold] = []
    for candidate in _candidates(model, walk, name, sample):
        paths = [candidate.before, *candidate.layers]
        kept = [p.clone() for path in paths for p in model.get_submodule(path).parameters()]
        inputs = matrix_of(model.get_submodule(candidate.layers[0])).shape[1]
        draw = torch.Generator().manual_seed(0)
        scales = candidate.shared(0.5 + torch.rand(inputs, generator=draw))
        candidate.apply(model, scales)
        apart = (walk.run_one(name, sample) - wanted).norm() / (wanted - sample).norm()
        for path in paths:
            for parameter in model.get_submodule(path).parameters():
                parameter.copy_(kept.pop(0))
        taken = {path for each in found for path in each.layers}
        if float(apart) < _APART and not taken & set(candidate.layers):
            found.append(candidate)
    return found


def _candidates(model: nn.Module, walk: Walk, name: str, sample: Tensor) -> list[Fold]:
    block = walk.blocks[name]
    layers = linear_layers(block, inside=name)
    given, made = _flow(walk, name, sample)
    readers: dict[int, list[str]] = {}
    for path, tensor in given.items():
        if path not in layers:  # an expert, which sees some tokens
            continue
        readers.setdefault(id(tensor), []).append(path)
    found = []
    for number, paths in readers.items():
        if number in made:
            found += [Fold(tuple(paths), made[number], kind) for kind in ("norm", "norm+1")]
    for before, after in _PAIRS:
        for path in layers:
            other = path.removesuffix(after) + before
            if not path.endswith(f".{after}") or other not in layers:
                continue
            rows = matrix_of(layers[other]).shape[0]
            inputs = matrix_of(layers[path]).shape[1]
            size = getattr(model.get_submodule(path.rpartition(".")[0]), "head_dim", 0)
            if rows == inputs:
                found.append(Fold((path,), other, "rows"))
            elif size and inputs % rows == 0 and rows % size == 0:
                found.append(Fold((path,), other, "rows", inputs // rows, size))
    return found


def _flow(walk: Walk, name: str, sample: Tensor) -> tuple[dict[str, Tensor], dict[int, str]]:
    """What each layer is given, and which module with a weight per feature made it."""
    made: dict[int, str] = {}
    kept: list[Tensor] = []

    def hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, given: object, output: object) -> None:
            if isinstance(output, Tensor):
                made[id(output)] = path
                kept.append(output)  # so that its id stays its own

        return note

    handles = [
        each.register_forward_hook(hook(f"{name}.{path}"))
        for path, each in walk.blocks[name].named_modules()
        if getattr(getattr(each, "weight", None), "ndim", 0) == 1
    ]
    inputs = Inputs(walk.blocks[name], inside=name)
    try:
        with inputs.hooked():
            given = inputs.of(lambda: walk.run_one(name, sample))
    finally:
        for handle in handles:
            handle.remove()
    return given, made


def scales_of(model: nn.Module, fold: Fold, seen: Mapping[str, Seen], grid: Grid) -> Tensor:
    """The scales [I] of least error among those tried; ones where none is better."""
    first = seen[fold.layers[0]]
    assert first.hessian is not None, "asked for"
    size = (first.sizes / first.count).float().clamp(min=_LEAST)
    weights = [matrix_of(model.get_submodule(path)).float() for path in fold.layers]
    best, least = torch.ones_like(size), float("inf")
    for step in range(_STEPS):
        scales = fold.shared(size ** (step / _STEPS))
        scales = scales / (scales.max() * scales.min()).sqrt()
        loss = sum(_error(weight, scales, first.hessian, grid) for weight in weights)
        if loss < least:
            best, least = scales, loss
    return best


def _error(weight: Tensor, scales: Tensor, hessian: Tensor, grid: Grid) -> float:
    apart = (nearest(weight * scales, grid).weight() / scales - weight).double()
    return float(((apart @ hessian) * apart).sum())


def fold_block(
    model: nn.Module,
    walk: Walk,
    name: str,
    seen: Mapping[str, Seen],
    grid: Grid,
    *,
    rounded: Sequence[str],
) -> int:
    """Scale what can be of a block before it is rounded, in place; how many layers were."""
    folds = [
        each for each in folds_of(model, walk, name) if all(path in rounded for path in each.layers)
    ]
    chosen = walk.workers.map(lambda fold: scales_of(model, fold, seen, grid), folds)
    for fold, scales in zip(folds, chosen, strict=True):
        fold.apply(model, scales)
    return sum(len(each.layers) for each in folds)
