"""Runs a model whose weights are not in memory: each operation reads those it uses, and drops them.

The model stays on the meta device. A mode of torch sees every operation before it is done, and puts
values in the place of weights. Tables are read by row, matrices that are too large by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shoal.errors import ModelError
from shoal.models.anatomy import canonical_parameters
from shoal.models.draw import InitRecord
from shoal.models.stored import Weights
from shoal.models.writing import COPIES
from shoal.units import format_bytes


@contextmanager
def reading(
    model: nn.Module, weights: Weights, *, record: InitRecord, limit_bytes: int
) -> Iterator[None]:
    """Within it `model`, on the meta device, computes with `weights`, in pieces of the limit.

    Its buffers become real. Raises ModelError where an operation needs more weights at once than
    `limit_bytes` allow, or hides them from torch's modes.
    """
    for path, module in model.named_modules():
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                name = f"{path}.{leaf}" if path else leaf
                module._buffers[leaf] = record.draw(name, seed=0)
    try:
        with _Reading(model, weights, limit_bytes=limit_bytes):
            yield
    except RuntimeError as error:  # values missing, or on two devices
        raise ModelError(
            f"{type(model).__name__}: it cannot be run without its weights in memory: {error}\n"
            "    merge it without --memory-limit"
        ) from error


class _Reading(TorchFunctionMode):
    def __init__(self, model: nn.Module, weights: Weights, *, limit_bytes: int) -> None:
        super().__init__()
        self._names = {id(each): name for name, each in canonical_parameters(model).items()}
        self._weights, self._limit_bytes = weights, limit_bytes
        self._most_numel = max(1, limit_bytes // (4 * COPIES))  # float32

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":
            # a property: of those that depend on values or their place only `device` is asked for
            if func == Tensor.device.__get__ and self._is_weight(args[0]):
                return torch.device("cpu")
            return func(*args, **kwargs)
        inside = _INSIDE.get(func)
        if inside is not None:
            found = inside(self, *args, **kwargs)
            if found is not None:
                return found
        held = [0]
        return func(*self._real(args, held), **self._real(kwargs, held))

    def _is_weight(self, value: Any) -> bool:
        return id(value) in self._names

    def _real(self, value: Any, held: list[int]) -> Any:
        """`value` with weights in the place of meta parameters; `held` counts their elements."""
        if isinstance(value, Tensor):
            return self._whole(value, held) if self._is_weight(value) else value
        if isinstance(value, tuple | list):
            return type(value)([self._real(each, held) for each in value])
        if isinstance(value, dict):
            return {key: self._real(each, held) for key, each in value.items()}
        return value

    def _whole(self, parameter: Tensor, held: list[int]) -> Tensor:
        held[0] += parameter.numel()
        if held[0] > self._most_numel:
            raise ModelError(
                f"{self._names[id(parameter)]}: its {format_bytes(4 * parameter.numel())} are "
                f"used at once; the limit is {format_bytes(self._limit_bytes)}\n"
                f"    use --memory-limit {4 * COPIES * held[0]}B, or none"
            )
        return self._read(parameter)

    def _read(self, parameter: Tensor, *begin_and_size: tuple[int, int]) -> Tensor:
        """The weight, or of its first dims `begin_and_size` only."""
        box = None
        if begin_and_size:
            begins, sizes = zip(*begin_and_size)
            rest = tuple(parameter.shape)[len(begins) :]
            box = ((*begins, *(0 for _ in rest)), (*sizes, *rest))
        value = self._weights.tensor(self._names[id(parameter)], box=box)
        assert value is not None, "names were compared"
        return value

    # --- what needs less than the whole

    def embedding(
        self, ids: Tensor, table: Tensor, padding_idx: int | None = None, *rest: Any, **more: Any
    ) -> Tensor | None:
        """Rows of a table. Its other options change the table or its gradient: not here."""
        if not self._is_weight(table):
            return None
        wanted, places = ids.unique(return_inverse=True)
        # a copy of each, for a row that was read may hold on to all of its file that is mapped
        rows = [self._read(table, (int(row), 1)).clone() for row in wanted]
        return torch.cat(rows)[places]

    def _embedding(self, table: Tensor, ids: Tensor, *rest: Any, **more: Any) -> Tensor | None:
        return self.embedding(ids, table)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """x W' + b, by rows of W."""
        if not self._is_weight(weight) or weight.numel() <= self._most_numel // 2:
            return None
        parts = [functional.linear(x, self._read(weight, r)) for r in self._rows(weight)]
        result = torch.cat(parts, dim=-1)
        return result if bias is None else result + self._real(bias, [0])

    def addmm(self, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
        """b + x W (GPT-2's Conv1D), summed over rows of W."""
        if not self._is_weight(weight) or weight.numel() <= self._most_numel // 2:
            return None
        result = x.new_zeros(x.shape[0], weight.shape[1])
        for at, rows in self._rows(weight):
            result += x[:, at : at + rows] @ self._read(weight, (at, rows))
        return result + self._real(bias, [0])

    def _rows(self, weight: Tensor) -> Iterator[tuple[int, int]]:
        many = max(1, self._most_numel // (2 * weight[0].numel()))
        for at in range(0, len(weight), many):
            yield at, min(many, len(weight) - at)


_INSIDE: dict[Any, Callable[..., Tensor | None]] = {
    functional.embedding: _Reading.embedding,
    torch.embedding: _Reading._embedding,
    functional.linear: _Reading.linear,
    torch.addmm: _Reading.addmm,
}
