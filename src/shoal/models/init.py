"""Initial weights that are the same in any layout: records how a model begins, and makes it real.

The model's own `_init_weights` runs on the meta device while its tensor operations are recorded:
per parameter and buffer the last distribution, and what was done to it afterwards (scaling, zeroed
rows). Any box is then drawn from that record, equal bit for bit to the slice of the whole.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

# no public name for it as of torch 2.13; function modes do not see inside torch.nn.init
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.boxes import Box
from shoal.errors import ModelError
from shoal.models.anatomy import canonical_name, ties_of
from shoal.models.draw import InitRecord, Operation
from shoal.models.families.first import FIRST

_FRESH = {"normal_": "normal", "uniform_": "uniform", "zero_": "fill", "fill_": "fill"}
_REWORK = {"mul_", "div_", "add_", "sub_", "clamp_", "erfinv_"}


class Source(Protocol):
    """Where weights come from instead of being drawn: None for a name it does not have."""

    def tensor(self, name: str, *, box: Box | None = None) -> Tensor | None:
        """The weight (or a box of it) by canonical name."""


def record(model: nn.Module) -> InitRecord:
    """Run the model's own `_init_weights` and note what it does to each tensor.

    `model`: a transformers model on the meta device. Its flags of initialisation are as before.
    """
    # As when transformers builds a model, ties are made after initialisation: what a tied head does
    # to its own weight must not overwrite the embedding's (its zeroed padding row, for one).
    recorder = _Recorder(model)
    aliases = [name for group in ties_of(model) for name in group[1:]]
    with _untied(model, aliases), _visible_truncation(), recorder, torch.no_grad():
        model.initialize_weights()  # type: ignore[operator]
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    found = recorder.result()
    config: Any = getattr(model, "config", None)
    first = FIRST.get(str(getattr(config, "model_type", "")))
    if first is None:
        return found
    unset = {name: (step,) for name, step in first(config).items() if name in found.shapes}
    return replace(found, programs={**unset, **{n: p for n, p in found.programs.items() if p}})


_patching = threading.Lock()


@contextlib.contextmanager
def _visible_truncation() -> Iterator[None]:
    """Spell truncated normals as plain tensor operations: torch >= 2.13 skips them on meta."""
    import transformers.initialization as theirs

    with _patching:
        torchs, kept = nn.init.trunc_normal_, theirs.TORCH_INIT_FUNCTIONS["trunc_normal_"]
        nn.init.trunc_normal_ = theirs.TORCH_INIT_FUNCTIONS["trunc_normal_"] = _truncate
        try:
            yield
        finally:
            nn.init.trunc_normal_ = torchs
            theirs.TORCH_INIT_FUNCTIONS["trunc_normal_"] = kept


def _truncate(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A normal number between a and b by inversion: what torch.nn.init.trunc_normal_ draws."""
    low, high = ((1 + math.erf((end - mean) / std / math.sqrt(2))) / 2 for end in (a, b))
    tensor.uniform_(2 * low - 1, 2 * high - 1, generator=generator).erfinv_()
    return tensor.mul_(std * math.sqrt(2)).add_(mean).clamp_(a, b)


@contextlib.contextmanager
def _untied(model: nn.Module, aliases: Sequence[str]) -> Iterator[None]:
    """Give tied names parameters of their own for a while."""
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in aliases}
    shared = {name: owners[name]._parameters[name.rpartition(".")[2]] for name in aliases}
    for name, parameter in shared.items():
        assert parameter is not None, f"{name}: tied to nothing"
        owners[name]._parameters[name.rpartition(".")[2]] = nn.Parameter(
            torch.empty_like(parameter)
        )
    try:
        yield
    finally:
        for name, parameter in shared.items():
            owners[name]._parameters[name.rpartition(".")[2]] = parameter


def materialise(
    model: nn.Module, *, record: InitRecord, seed: int, source: Source | None = None
) -> nn.Module:
    """Give a meta model real float32 weights on the CPU: from `source`, or else drawn.

    Ties are kept (and asserted equal to the model's), buffers recomputed. Works in place and
    returns the model. Raises ModelError for a weight that nothing initialises.
    """
    ties = ties_of(model)
    made: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                name = canonical_name(f"{path}.{leaf}" if path else leaf)
                value = source.tensor(name) if source is not None else None
                if value is None:
                    value = record.draw(name, seed=seed)
                real = nn.Parameter(value.to(torch.float32), requires_grad=parameter.requires_grad)
                made[id(parameter)] = made[id(real)] = real
                # keep the meta parameter alive so that its id is not given to another
                real._meta_origin = parameter  # type: ignore[attr-defined]
            module._parameters[leaf] = made[id(parameter)]
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = record.draw(f"{path}.{leaf}" if path else leaf, seed=seed)
    for parameter in model.parameters():
        parameter.__dict__.pop("_meta_origin", None)
    assert ties_of(model) == ties, "materialise: the tied parameters changed"
    return model


class _Recorder(TorchDispatchMode):
    """Sees every tensor operation and keeps those that write into the model's tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}
        self.programs: dict[str, list[Operation]] = {}
        every = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in every:
            name = canonical_name(name)
            self.tensors[name] = tensor
            self.names[_storage(tensor)] = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if name.endswith("_") and target is not None and _storage(target) in self.names:
            self._note(self.names[_storage(target)], name, target, args[1:], kwargs or {})
        return result

    def _note(
        self, name: str, operation: str, view: Tensor, args: tuple[Any, ...], kwargs: Any
    ) -> None:
        whole = self.tensors[name]
        region = None if view.numel() == whole.numel() else _region(whole, view)
        arguments: tuple[float, ...] = ()
        if operation in _FRESH or operation in _REWORK:
            arguments = tuple(_number(each) for each in (*args, *_bounds(operation, kwargs)))
        if operation == "copy_":
            step = Operation("values", (), region, _known(name, args[0]))
        elif operation in _FRESH:
            defaults = {"normal_": (0.0, 1.0), "uniform_": (0.0, 1.0), "zero_": (0.0,)}
            filled = arguments + defaults.get(operation, ())[len(arguments) :]
            step = Operation(_FRESH[operation], filled, region)
        elif operation in _REWORK:
            step = Operation(operation, arguments, region)
        else:
            raise ModelError(
                f"{name}: its initialisation uses {operation!r}, which has no form by position\n"
                "    use another family"
            )
        program = self.programs.setdefault(name, [])
        if region is None and step.kind not in _REWORK:
            program.clear()
        program.append(step)

    def result(self) -> InitRecord:
        parameters = {name for name, each in self.tensors.items() if isinstance(each, nn.Parameter)}
        return InitRecord(
            shapes={name: tuple(each.shape) for name, each in self.tensors.items()},
            programs={name: tuple(steps) for name, steps in self.programs.items()},
            dtypes={n: each.dtype for n, each in self.tensors.items() if n not in parameters},
        )


def _storage(tensor: Tensor) -> int:
    # on the meta device every data pointer is 0; the storage object tells views of one tensor
    return int(tensor.untyped_storage()._cdata)


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)


def _bounds(operation: str, kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    order = {"clamp_": ("min", "max"), "normal_": ("mean", "std"), "uniform_": ("from", "to")}
    return tuple(kwargs[key] for key in order.get(operation, ()) if kwargs.get(key) is not None)


def _known(name: str, source: Tensor) -> Tensor:
    if source.is_meta:
        raise ModelError(
            f"{name}: its initial values are computed on the model's device, out of sight\n"
            "    use another family"
        )
    return source.detach().clone()


def _region(whole: Tensor, view: Tensor) -> Box:
    """The box that a rectangular view is inside a contiguous tensor."""
    offset = view.storage_offset() - whole.storage_offset()
    sizes_by_stride = {stride: size for stride, size in zip(view.stride(), view.shape) if size > 1}
    offsets, sizes = [], []
    for stride in whole.stride():
        start, offset = divmod(int(offset), int(stride)) if stride else (0, offset)
        offsets.append(start)
        sizes.append(sizes_by_stride.get(stride, 1))
    if int(np.prod(sizes)) != view.numel():
        raise ModelError(f"initialisation of a strided slice of shape {tuple(view.shape)}")
    return Box(tuple(offsets), tuple(sizes))
