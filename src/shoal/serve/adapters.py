"""LoRA adapters by request: rows of one adapter get its part, after the product that all share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoal.errors import ModelError
from shoal.models.adapter_files import AdapterFolder
from shoal.serve.cache import Span
from shoal.serve.exact import Product, way_for
from shoal.serve.rows import Way


@dataclass(frozen=True)
class _Part:
    """Of one adapter at one layer: x -> scale x B A x (arXiv 2106.09685)."""

    low: Product
    up: Product
    scale: float

    def of(self, rows: Tensor) -> Tensor:
        found: Tensor = self.up.forward(self.low.forward(rows) * self.scale)
        return found


class Adapters:
    """All adapters of a served model, and whose rows this step's are."""

    def __init__(self, model: nn.Module, folders: Mapping[str, str]) -> None:
        """Read `folders` by name, and have the layers of `model` add their parts.

        Call it after the products were made exact. Raises ModelError for a folder that does not
        fit, and for adapters that do more than add to products of the blocks.
        """
        self._rows: list[tuple[str, Tensor]] = []
        self.names = tuple(folders)
        by_path: dict[str, dict[str, _Part]] = {}
        ways: dict[tuple[int, int], Way] = {}
        for name, folder in folders.items():
            for path, part in _parts(model, Path(folder), ways).items():
                by_path.setdefault(path, {})[name] = part
        for path, parts in by_path.items():
            self._attach(model.get_submodule(path), parts)

    def lay_out(self, names: Sequence[str | None], spans: Sequence[Span]) -> None:
        """The next step has `spans` one after another, each with the adapter of its name."""
        columns: dict[str, list[int]] = {}
        first = 0
        for name, span in zip(names, spans, strict=True):
            if name is not None:
                columns.setdefault(name, []).extend(range(first, first + span.count))
            first += span.count
        self._rows = [(name, torch.tensor(each)) for name, each in columns.items()]

    def _attach(self, module: nn.Module, parts: Mapping[str, _Part]) -> None:
        base = module.forward

        def forward(rows: Tensor) -> Tensor:
            made: Tensor = base(rows)
            for name, columns in self._rows:
                part = parts.get(name)
                if part is not None:
                    own = rows.flatten(0, -2).index_select(0, columns)
                    flat = made.flatten(0, -2).index_add(0, columns, part.of(own))
                    made = flat.view(made.shape)
            return made

        module.forward = forward  # type: ignore[method-assign]


def _parts(model: nn.Module, folder: Path, ways: dict[tuple[int, int], Way]) -> dict[str, _Part]:
    read = AdapterFolder(folder)
    if read.settings.has_magnitude:
        raise ModelError(
            f"{folder}: DoRA changes lengths of rows, which is not served by request\n"
            "    merge the adapter into its model, and serve that"
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    found = {}
    for path in read.settings.targets:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise ModelError(
                f"{folder}: it is for {path}, which the model has not\n"
                "    serve the model that it was trained on"
            ) from None
        if module is head or not isinstance(module, nn.Linear | Conv1D):
            raise ModelError(
                f"{folder}: it is for {path}; only adapters of the blocks' linear layers are "
                "served by request\n    merge the adapter into its model, and serve that"
            )
        low, up = read.tensor(f"{path}.lora_a"), read.tensor(f"{path}.lora_b")
        if low is None or up is None or _shape(module) != (up.shape[0], low.shape[1]):
            raise ModelError(
                f"{folder}: what it has for {path} does not fit a layer of {_shape(module)}\n"
                "    serve the model that it was trained on"
            )
        like = next(model.parameters())
        products = []
        for weight in (low.to(like), up.to(like)):
            shape = (weight.shape[0], weight.shape[1])
            if shape not in ways:
                ways[shape] = way_for(weight)
            products.append(Product(weight, None, ways[shape]))
        found[path] = _Part(products[0], products[1], read.settings.scale)
    return found


def _shape(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a layer."""
    weight = module.weight
    assert isinstance(weight, Tensor), "layers have one weight"
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
