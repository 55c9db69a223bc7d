"""The stored form of a model: the tensors of its Hugging Face folder, and what each is made of.

transformers stores some families under other names than the model has, or in another form (experts
apart, projections joined). What it would do is found on meta tensors, without a value: a tensor
that comes through as it went in is only renamed, and can be written in pieces; one that is computed
needs the weights of its block, and is made block by block where its blocks do not mix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# private names of transformers 5.23, used here only: what its save_pretrained does to a state dict,
# which has no public form that works without the values
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from shoal.boxes import Box
from shoal.errors import ModelError
from shoal.models.anatomy import canonical_parameters

_BLOCK = re.compile(r"(?:^|.*?\.)\d+\.")
"""The part of a name that says which block it is of: up to the first number."""


class Weights(Protocol):
    """The canonical parameters of a model, to be read whole or in boxes."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each, by canonical name."""

    def tensor(self, name: str, *, box: Box | None = None) -> Tensor | None:
        """A weight, or a box of it; float32."""


@dataclass(frozen=True)
class InMemory:
    """Weights that are in memory already."""

    tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each, by canonical name."""
        return {name: tuple(each.shape) for name, each in self.tensors.items()}

    def tensor(self, name: str, *, box: Box | None = None) -> Tensor | None:
        """A weight, or a box of it; a view."""
        whole = self.tensors[name].detach()
        return whole if box is None else whole[box.slices]


@dataclass(frozen=True)
class Stored:
    """One tensor of the folder: the weight whose values it has, or the group it is computed in."""

    meta: Tensor
    """Its shape and dtype."""
    weight: str | None = None
    """Canonical name."""
    group: int = 0
    """Into `Form.groups`, where `weight` is None."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)


class Form:
    """What a folder of `model` holds (`tensors`, by stored name, in transformers' own order).

    `model`: on the meta device, in the dtype that is stored.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        state: dict[str, Tensor] = model.state_dict()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = [name for name in state if name not in parameters]
        if buffers:
            raise ModelError(
                f"{type(model).__name__}: it stores values that are no parameters ({buffers[0]}), "
                "which shoal does not keep\n    use another family"
            )
        first = {id(each): name for name, each in canonical_parameters(model).items()}
        state = remove_tied_weights_from_state_dict(state, model)  # type: ignore[arg-type]
        self._canonical = {name: first[id(parameters[name])] for name in state}
        converted = self._convert(state)
        by_identity = {id(tensor): name for name, tensor in state.items()}
        self.groups: list[dict[str, Tensor]] = []
        whose = {}
        if any(id(tensor) not in by_identity for tensor in converted.values()):
            self.groups = _groups(state, converted, self._convert)
            whose = {name: n for n, g in enumerate(self.groups) for name in self._convert(g)}
        self.tensors: dict[str, Stored] = {}
        for name, tensor in converted.items():
            source = by_identity.get(id(tensor))
            if source is not None:
                self.tensors[name] = Stored(tensor, self._canonical[source])
            else:
                self.tensors[name] = Stored(tensor, None, whose[name])

    @property
    def is_renamed(self) -> bool:
        """Whether all it holds are weights of the model, under whatever names."""
        return all(each.weight is not None for each in self.tensors.values())

    def group_bytes(self, number: int) -> int:
        """Most memory that `compute` takes: what goes in (float32), what it is cast to and out."""
        numel = sum(tensor.numel() for tensor in self.groups[number].values())
        return 4 * numel + 3 * numel * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """What the floating values are stored as."""
        return next(self.model.parameters()).dtype

    def compute(self, number: int, weights: Weights) -> dict[str, Tensor]:
        """The stored tensors of one group, from the values of its weights."""
        values = {}
        for name in self.groups[number]:
            value = weights.tensor(self._canonical[name])
            assert value is not None, "names were compared"
            values[name] = value.to(self.dtype)
        return self._convert(values)

    def _convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        model: Any = self.model
        found: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
        return found


def _groups(
    state: dict[str, Tensor],
    converted: dict[str, Tensor],
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> list[dict[str, Tensor]]:
    """Weights by block, where blocks are converted alone as they are together; else all in one."""
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _BLOCK.match(name)
        blocks.setdefault(match[0] if match else name, {})[name] = tensor
    alone: dict[str, tuple[int, ...]] = {}
    for block in blocks.values():
        for name, tensor in convert(block).items():
            if name in alone:
                return [state]
            alone[name] = tuple(tensor.shape)
    if alone != {name: tuple(tensor.shape) for name, tensor in converted.items()}:
        return [state]
    return list(blocks.values())


def check_names(model: nn.Module, weights: Weights) -> None:
    """The weights are those of `model`. Raises ModelError."""
    wanted = {name: tuple(p.shape) for name, p in canonical_parameters(model).items()}
    found = dict(weights.shapes)
    absent, foreign = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if absent or foreign:
        raise ModelError(
            f"export: the tensors are not those of a {type(model).__name__}\n"
            f"    lacking: {', '.join(absent[:5]) or 'none'}; "
            f"unknown: {', '.join(foreign[:5]) or 'none'}"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ModelError(
                f"export: {name} has shape {found[name]}, expected {shape}\n"
                "    the configuration is of another model"
            )


def boxes_in_order(shape: tuple[int, ...], *, most_numel: int) -> list[Box]:
    """Boxes of at most `most_numel` elements that lie one after another in memory, all of it."""
    if prod(shape) <= max(1, most_numel) or not shape:
        return [Box.whole(shape)]
    row = prod(shape[1:])
    if row <= most_numel:
        rows = most_numel // row
        begins, rest = range(0, shape[0], rows), (0,) * (len(shape) - 1)
        return [Box((at, *rest), (min(rows, shape[0] - at), *shape[1:])) for at in begins]
    inner = boxes_in_order(shape[1:], most_numel=most_numel)
    return [Box((at, *b.offsets), (1, *b.sizes)) for at in range(shape[0]) for b in inner]
