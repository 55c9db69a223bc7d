"""Adapters: small matrices beside frozen weights (LoRA, DoRA), under the names of their layers.

A layer keeps its module, its name and its weight W [out, in]; it gains `lora_a` [r, in], drawn, and
`lora_b` [out, r], zero, and computes x W^T + scale x (x A^T) B^T (Hu et al., arXiv 2106.09685,
section 4.1). DoRA divides each row of W + scale x B A by its length, held fixed in the backward
pass, and multiplies it by a trained one (Liu et al., arXiv 2402.09353, equations 5 and 11);
`lora_magnitude` [out] is what that differs by from W's own, so that it begins at zero.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from shoal.boxes import Box
from shoal.errors import ConfigError, ModelError, Problem, nearest
from shoal.models.anatomy import canonical_parameters
from shoal.models.draw import InitRecord, Operation
from shoal.models.dropout import KeyedDropout
from shoal.models.init import Source
from shoal.models.placement import is_transposed
from shoal.models.rounded_base import RoundedWeight, rounded
from shoal.models.stored import Weights

ALL_LINEAR = "all-linear"
NAMES = ("lora_a", "lora_b", "lora_magnitude")
ADAPTER_DROPOUT = "lora_dropout"
"""The module of a layer that drops what goes into A."""
_MARK = "shoal_adaptation"


@dataclass(frozen=True)
class AdapterSettings:
    """What is put beside which layers."""

    kind: str
    rank: int
    scale: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    base: str = "float32"
    """What the frozen matrices are kept in: float32, int8 or nf4."""

    @property
    def has_magnitude(self) -> bool:
        """Whether rows have a length of their own (DoRA)."""
        return self.kind == "dora"


class Adaptation:
    """What the adapter of one layer computes."""

    def __init__(self, settings: AdapterSettings, dropout: nn.Module | None) -> None:
        self.scale, self.dropout = settings.scale, dropout
        self.has_magnitude, self.is_on = settings.has_magnitude, True
        self.rounded: RoundedWeight | None = None
        """The layer's matrix, where it is kept so."""
        self.total: Callable[[Tensor], Tensor] = lambda squares: squares
        """Sums squares of parts of rows, where a strategy has cut them (parallel/tensor.py)."""

    def added(self, layer: nn.Module, hidden: Tensor, base: Tensor) -> Tensor:
        """`base` = x W^T, without a bias, and its part: [..., in], [..., out] -> [..., out]."""
        module: Any = layer
        if self.dropout is not None:
            hidden = self.dropout(hidden)
        low = functional.linear(hidden, module.lora_a) * self.scale
        if not self.has_magnitude:
            # one pass over the outputs less than a product and a sum
            up, flat = module.lora_b.to(base.dtype).t(), low.flatten(0, -2).to(base.dtype)
            return torch.addmm(base.flatten(0, -2), flat, up).view(base.shape)
        product = functional.linear(low, module.lora_b)
        plain = base
        if self.dropout is not None and layer.training:
            plain = _plain(layer, hidden)
        factor = self._factor(layer).to(base.dtype)
        return base + (factor - 1) * plain + factor * product

    def _factor(self, layer: nn.Module) -> Tensor:
        """Trained over present length of each row [out]; the present one is held fixed."""
        module: Any = layer
        with torch.no_grad():
            weight = matrix_of(layer)
            changed = weight + self.scale * (module.lora_b @ module.lora_a)
            squares = torch.stack([weight.square().sum(1), changed.square().sum(1)])
            own, present = self.total(squares).sqrt()
        factor: Tensor = (own + module.lora_magnitude) / present
        return factor


def adaptation_of(layer: nn.Module) -> Adaptation | None:
    """The adapter of a layer; None: it has none."""
    return getattr(layer, _MARK, None)


def matrix_of(layer: nn.Module) -> Tensor:
    """Its weight as [out, in]; a Conv1D (GPT-2) keeps it the other way round."""
    weight: Any = layer.weight
    if weight is None:
        return _rounded_of(layer).restored()
    return weight.t() if is_transposed(layer) else weight  # type: ignore[no-any-return]


def _rounded_of(layer: nn.Module) -> RoundedWeight:
    adaptation = adaptation_of(layer)
    assert adaptation is not None and adaptation.rounded is not None, "its matrix is not filled yet"
    return adaptation.rounded


def _plain(layer: nn.Module, hidden: Tensor) -> Tensor:
    """x W^T."""
    if layer.weight is None:
        return _rounded_of(layer).product(hidden)
    return functional.linear(hidden, matrix_of(layer))


def product(layer: nn.Module, hidden: Tensor) -> Tensor:
    """x W^T with the adapter's part, without a bias."""
    base = _plain(layer, hidden)
    adaptation = adaptation_of(layer)
    if adaptation is None or not adaptation.is_on:
        return base
    return adaptation.added(layer, hidden, base)


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Run the model as it was before its adapters: a reference that needs no copy.

    Raises ModelError for a model without any.
    """
    every = [found for each in model.modules() if (found := adaptation_of(each)) is not None]
    if not every:
        raise ModelError(
            f"{type(model).__name__}: it has no adapters to switch off\n    set model.adapter"
        )
    for each in every:
        each.is_on = False
    try:
        yield
    finally:
        for each in every:
            each.is_on = True


def targets_of(
    model: nn.Module, *, blocks: Sequence[str], patterns: Sequence[str]
) -> dict[str, nn.Module]:
    """The linear layers that adapters go beside, by path. Raises ConfigError for an idle pattern.

    `blocks`: paths of the model's lists of blocks, whose layers `all-linear` means.
    """
    linear = {path: each for path, each in model.named_modules() if _is_linear(each)}
    shared = {id(p) for p in _tied(model)}
    chosen: dict[str, nn.Module] = {}
    problems = []
    for pattern in patterns:
        found = [path for path in linear if _matches(path, pattern, blocks)]
        chosen |= {path: linear[path] for path in found}
        tied = [path for path in found if id(linear[path].weight) in shared]
        if not found:
            leaves = sorted({path.rpartition(".")[2] for path in linear})
            what = f"{pattern!r} matches no linear layer"
            near = nearest(pattern.rpartition(".")[2].strip("*"), leaves)
            problems.append(Problem("model.adapter.targets", what, near))
        elif tied:
            what = f"{pattern!r}: {tied[0]} shares its weight with another layer"
            hint = "name layers inside the blocks, or all-linear"
            problems.append(Problem("model.adapter.targets", what, hint))
    if problems:
        raise ConfigError(problems)
    return {path: linear[path] for path in linear if path in chosen}


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_transposed(module)


def _tied(model: nn.Module) -> Iterator[nn.Parameter]:
    seen = set[int]()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            yield parameter
        seen.add(id(parameter))


def _matches(path: str, pattern: str, blocks: Sequence[str]) -> bool:
    if pattern == ALL_LINEAR:
        return any(path.startswith(f"{each}.") for each in blocks)
    return path == pattern or path.endswith(f".{pattern}") or fnmatch.fnmatchcase(path, pattern)


def attach(
    model: nn.Module,
    *,
    settings: AdapterSettings,
    blocks: Sequence[str],
    seed: int,
    dropout: str,
    record: InitRecord,
) -> tuple[list[str], InitRecord]:
    """Put adapters beside the layers of a meta model, in place; their names, and how they begin.

    Raises ConfigError for targets that are no layers of it.
    """
    shapes, programs = dict(record.shapes), dict(record.programs)
    names = []
    targets = targets_of(model, blocks=blocks, patterns=settings.targets)
    for path, layer in targets.items():
        outputs, inputs = matrix_of(layer).shape
        bound = 1 / math.sqrt(inputs)  # torch's own of a linear layer, which peft draws A by
        begins: dict[str, tuple[tuple[int, ...], Operation]] = {
            "lora_a": ((settings.rank, inputs), Operation("uniform", (-bound, bound))),
            "lora_b": ((outputs, settings.rank), Operation("fill", (0.0,))),
        }
        if settings.has_magnitude:
            begins["lora_magnitude"] = ((outputs,), Operation("fill", (0.0,)))
        for leaf, (shape, operation) in begins.items():
            layer.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
            names.append(f"{path}.{leaf}")
            shapes[names[-1]], programs[names[-1]] = shape, (operation,)
        if settings.dropout and dropout != "off":
            layer.lora_dropout = _dropout(settings.dropout, kind=dropout, seed=seed, path=path)
        adaptation = Adaptation(settings, getattr(layer, "lora_dropout", None))
        object.__setattr__(layer, _MARK, adaptation)
        layer.forward = _forward(layer)
        if settings.base != "float32":
            layer.register_parameter("weight", None)
    return names, replace(record, shapes=shapes, programs=programs)


def _dropout(probability: float, *, kind: str, seed: int, path: str) -> nn.Module:
    if kind == "keyed":
        return KeyedDropout(probability, seed=seed, layer=f"{path}.lora_dropout")
    return nn.Dropout(probability)


def _forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    module: Any = layer

    def forward(hidden: Tensor) -> Tensor:
        output = product(layer, hidden)
        return output if module.bias is None else output + module.bias.to(output.dtype)

    return forward


def rounded_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """[out, in] of the matrices that are no parameters but kept rounded, by canonical name."""
    found = {}
    for path, layer in model.named_modules():
        if adaptation_of(layer) is not None and layer.weight is None:
            module: Any = layer
            found[f"{path}.weight"] = (int(module.lora_b.shape[0]), int(module.lora_a.shape[1]))
    return found


def fill_rounded(
    model: nn.Module, weights: Mapping[str, RoundedWeight], *, source: Source | None
) -> None:
    """Give layers their matrices in `weights`, read from `source`; None: they are there already.

    Raises ModelError for one that the source lacks.
    """
    for name, weight in weights.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        adaptation = adaptation_of(layer)
        assert adaptation is not None, f"{name}: rounded matrices stand beside adapters"
        adaptation.rounded = weight
        if source is None:
            continue
        value = source.tensor(name)
        if value is None:
            raise ModelError(
                f"{name}: the folder of model.path lacks it, and such a model.adapter.base keeps "
                "what lies there\n    set model.adapter.base to float32"
            )
        weight.copy_(value.t() if is_transposed(layer) else value)


def is_adapter(name: str) -> bool:
    """Whether a canonical name is of an adapter's parameter."""
    return name.rpartition(".")[2] in NAMES


def new_head(model: nn.Module) -> list[str]:
    """Names outside of the base model that no pretraining has: a classifier, as peft trains it."""
    base = str(getattr(model, "base_model_prefix", ""))
    wrapped: Any = model
    if not hasattr(model, base) or wrapped.get_output_embeddings() is not None:
        return []
    return [name for name in canonical_parameters(model) if not name.startswith(f"{base}.")]


class Folded:
    """The weights of the model that adapters come to; implements `Weights`.

    `trained`: what a run has of them, the adapters and perhaps all else; `base` has what is not
    there. `model`: without adapters, on the meta device. A base that was kept rounded is what
    remained of it there.
    """

    def __init__(
        self, trained: Weights, *, base: Source | None, model: nn.Module, settings: AdapterSettings
    ) -> None:
        self.trained, self._base, self.model, self.settings = trained, base, model, settings
        self.shapes = {name: tuple(p.shape) for name, p in canonical_parameters(model).items()}

    @property
    def learned(self) -> list[str]:
        """Names of what was trained."""
        head = set(new_head(self.model))
        return [name for name in self.trained.shapes if is_adapter(name) or name in head]

    def before(self, name: str, *, box: Box | None = None) -> Tensor:
        """A weight as it was, or a box of it (of a matrix beside an adapter: of whole rows).

        Raises ModelError where nobody has it.
        """
        found = None
        if name in self.trained.shapes:
            found = self.trained.tensor(name, box=box)
        elif self._base is not None:
            found = self._base.tensor(name, box=box)
        if found is None:
            raise ModelError(
                f"{name}: neither the run nor the model that it began with has it\n"
                "    put back the folder of model.path"
            )
        if self.settings.base != "float32" and self._is_beside(name):
            layer = self.model.get_submodule(name.rpartition(".")[0])
            found = rounded(found, self.settings.base, turned=is_transposed(layer))
        return found

    def tensor(self, name: str, *, box: Box | None = None) -> Tensor:
        """A weight, or a box of it; float32."""
        if not self._is_beside(name):
            return self.before(name, box=box)
        path = name.rpartition(".")[0]
        outputs, inputs = (1, 0) if is_transposed(self.model.get_submodule(path)) else (0, 1)
        shape = self.shapes[name]
        asked = Box.whole(shape) if box is None else box
        first, count = asked.offsets[outputs], asked.sizes[outputs]
        rows = Box((first, 0), (count, shape[inputs]))  # of W as [out, in]: whole ones, for DoRA
        weight = self.before(name, box=rows if inputs else _turned(rows))
        changed = self._changed(path, weight if inputs else weight.t(), slice(first, first + count))
        start = asked.offsets[inputs]
        found = changed[:, start : start + asked.sizes[inputs]]
        return (found if inputs else found.t()).contiguous()

    def _is_beside(self, name: str) -> bool:
        """Whether it is a matrix that an adapter stands beside."""
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and f"{path}.lora_a" in self.trained.shapes

    def _changed(self, path: str, weight: Tensor, rows: slice) -> Tensor:
        """Rows [n, in] of W with the adapter's part, of all outputs those in `rows`."""
        a = self._values(f"{path}.lora_a")
        changed = weight + self.settings.scale * (self._values(f"{path}.lora_b")[rows] @ a)
        if not self.settings.has_magnitude:
            return changed
        own, present = weight.norm(dim=1), changed.norm(dim=1)
        magnitude = self._values(f"{path}.lora_magnitude")[rows]
        return changed * ((own + magnitude) / present)[:, None]

    def _values(self, name: str) -> Tensor:
        value = self.trained.tensor(name)
        assert value is not None, f"{name}: an adapter has all its parts"
        return value.detach()


def _turned(box: Box) -> Box:
    return Box(box.offsets[::-1], box.sizes[::-1])
