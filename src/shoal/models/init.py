"""Initial weights that depend on (seed, canonical name, element position) only, in any layout.

The model's own `_init_weights` runs on the meta device while its tensor operations are recorded:
per parameter and buffer the last distribution, and what was done to it afterwards (scaling, zeroed
rows). Any box is then drawn from that record, equal bit for bit to the slice of the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# no public name for it as of torch 2.13; function modes do not see inside torch.nn.init
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.errors import ModelError
from shoal.models.anatomy import canonical_name, ties_of
from shoal.models.random_bits import Floats, key_of, normal_quantile, uniform

Box = tuple[Sequence[int], Sequence[int]]
"""Offsets and sizes, one per dim."""

_CHUNK = 1 << 15
"""Elements drawn at once: the temporaries stay in the second-level cache."""

_FRESH = {"normal_": "normal", "uniform_": "uniform", "zero_": "fill", "fill_": "fill"}
_REWORK = {"mul_", "div_", "add_", "sub_", "clamp_", "erfinv_"}
_SQRT_HALF = 0.7071067811865476


class Source(Protocol):
    """Where weights come from instead of being drawn: None for a name it does not have."""

    def tensor(self, name: str, *, box: Box | None = None) -> Tensor | None:
        """The weight (or a box of it) by canonical name."""


@dataclass(frozen=True)
class Operation:
    """One recorded step: normal(mean, std), uniform(low, high), fill(value), values, mul_, ..."""

    kind: str
    arguments: tuple[float, ...] = ()
    region: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class InitRecord:
    """How each parameter and buffer of one model begins; by canonical name."""

    shapes: Mapping[str, tuple[int, ...]]
    programs: Mapping[str, tuple[Operation, ...]]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def program(self, name: str) -> tuple[Operation, ...]:
        """The steps for one name. Raises ModelError when the model never initialises it."""
        program = self.programs.get(name, ())
        if not program:
            raise ModelError(
                f"{name}: the model's own _init_weights does not initialise it, so its first value "
                "is unknown\n    start from pretrained weights, or use another family"
            )
        return program

    def draw(self, name: str, *, seed: int, box: Box | None = None) -> Tensor:
        """Initial value of one parameter, or of a box of it; float32 (buffers: their own type).

        The whole is cut, never drawn again: `draw(box)` equals `draw()[box]` bit for bit.
        """
        program, shape = self.program(name), self.shapes[name]
        offsets, sizes = box if box is not None else ((0,) * len(shape), shape)
        if len(offsets) != len(shape) or any(
            start < 0 or size < 0 or start + size > whole
            for start, size, whole in zip(offsets, sizes, shape)
        ):
            raise ModelError(f"{name}: box {offsets}+{sizes} is outside shape {shape}")
        dtype = self.dtypes.get(name, torch.float32)
        if program[-1].kind == "values" and program[-1].region is None:
            values = program[-1].values
            assert values is not None, f"{name}: recorded without its values"
            cut = tuple(slice(o, o + s) for o, s in zip(offsets, sizes))
            return values[cut].to(dtype).clone()
        result = np.empty(
            int(np.prod(sizes, dtype=np.int64)),
            dtype=np.float64 if dtype == torch.float64 else np.float32,
        )
        if program[0].kind == "fill" and len(program) == 1:
            result.fill(program[0].arguments[0])
        else:
            key = key_of(seed, name)
            for span, positions in _positions(shape, tuple(offsets), tuple(sizes)):
                result[span] = _run(program, positions, key=key, shape=shape)
        return torch.from_numpy(result).to(dtype).reshape(tuple(sizes))


def record(model: nn.Module) -> InitRecord:
    """Run the model's own `_init_weights` and note what it does to each tensor.

    `model`: a transformers model on the meta device. Its flags of initialisation are as before.
    """
    # As when transformers builds a model, ties are made after initialisation: what a tied head does
    # to its own weight must not overwrite the embedding's (its zeroed padding row, for one).
    recorder = _Recorder(model)
    aliases = [name for group in ties_of(model) for name in group[1:]]
    with _untied(model, aliases), recorder, torch.no_grad():
        model.initialize_weights()  # type: ignore[operator]
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    return recorder.result()


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
                "    start from pretrained weights, or use another family"
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
            "    start from pretrained weights, or use another family"
        )
    return source.detach().clone()


def _region(whole: Tensor, view: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of a rectangular view inside a contiguous tensor."""
    offset = view.storage_offset() - whole.storage_offset()
    sizes_by_stride = {stride: size for stride, size in zip(view.stride(), view.shape) if size > 1}
    offsets, sizes = [], []
    for stride in whole.stride():
        start, offset = divmod(int(offset), int(stride)) if stride else (0, offset)
        offsets.append(start)
        sizes.append(sizes_by_stride.get(stride, 1))
    if int(np.prod(sizes)) != view.numel():
        raise ModelError(f"initialisation of a strided slice of shape {tuple(view.shape)}")
    return tuple(offsets), tuple(sizes)


def _positions(
    shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> Iterator[tuple[slice, NDArray[np.uint64]]]:
    """Flat positions of a box in the whole, in row-major order, chunk by chunk."""
    run, starts = 1, np.zeros(1, dtype=np.uint64)
    strides = [int(np.prod(shape[d + 1 :], dtype=np.int64)) for d in range(len(shape))]
    last = len(shape)
    # dims that the box covers wholly at the end are one run of consecutive elements
    while last > 0 and sizes[last - 1] == shape[last - 1]:
        last -= 1
        run *= shape[last]
    if last > 0:
        last -= 1
        run *= sizes[last]
    for d in range(last):
        steps = (np.arange(sizes[d], dtype=np.uint64) + np.uint64(offsets[d])) * np.uint64(
            strides[d]
        )
        starts = (starts[:, None] + steps[None, :]).reshape(-1)
    if last < len(shape):
        starts = starts + np.uint64(offsets[last] * strides[last])
    done = 0
    rows = max(1, _CHUNK // max(run, 1))
    for first in range(0, len(starts), rows):
        for begin in range(0, run, _CHUNK):
            width = np.arange(begin, min(begin + _CHUNK, run), dtype=np.uint64)
            block = (starts[first : first + rows, None] + width[None, :]).reshape(-1)
            yield slice(done, done + len(block)), block
            done += len(block)


def _run(
    program: Sequence[Operation], positions: NDArray[np.uint64], *, key: int, shape: tuple[int, ...]
) -> Floats:
    """Execute a program for some positions; float64."""
    current: Floats = np.zeros(len(positions), dtype=np.float64)
    for index, step in enumerate(program):
        if step.region is None:
            current = _apply(step, current, positions, key=key + index)
            continue
        inside = np.flatnonzero(_inside(positions, shape, step.region))
        if inside.size:
            current[inside] = _apply(step, current[inside], positions[inside], key=key + index)
    return current


def _inside(
    positions: NDArray[np.uint64], shape: tuple[int, ...], region: Any
) -> NDArray[np.bool_]:
    rest, result = positions, np.ones(len(positions), dtype=bool)
    for whole, start, size in zip(reversed(shape), reversed(region[0]), reversed(region[1])):
        place = rest % np.uint64(whole)
        rest = rest // np.uint64(whole)
        result &= (place >= start) & (place < start + size)
    return result


def _apply(step: Operation, current: Floats, positions: NDArray[np.uint64], *, key: int) -> Floats:
    kind, arguments = step.kind, step.arguments
    if kind == "normal":
        drawn = normal_quantile(uniform(positions.copy(), key=key))
        drawn *= arguments[1]
        drawn += arguments[0]
        return drawn
    if kind == "uniform":
        drawn = uniform(positions.copy(), key=key)
        drawn *= arguments[1] - arguments[0]
        drawn += arguments[0]
        return drawn
    if kind == "fill":
        return np.full_like(current, arguments[0])
    if kind == "mul_":
        return current * arguments[0]
    if kind == "div_":
        return current / arguments[0]
    if kind == "add_":
        return current + arguments[0]
    if kind == "sub_":
        return current - arguments[0]
    if kind == "clamp_":
        return np.clip(current, arguments[0], arguments[1])
    if kind == "erfinv_":
        # a uniform number on (-1, 1) becomes normal: how torch draws a truncated normal
        return normal_quantile((current + 1.0) * 0.5) * _SQRT_HALF
    raise ModelError(f"initialisation step {kind!r} of a slice is not supported")
