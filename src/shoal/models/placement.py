"""Placement of every parameter on the tensor axis, with its gradient rule.

Along `shard` no table is needed: every parameter is cut on its first dim, and its gradient is
summed as it is scattered. Along `replicate` every parameter is whole and its gradient summed.

The rules of the tensor axis, for hidden states that are split along the sequence between regions
(legal/families has the layers that are cut):

- a cut parameter's gradient is right as it is on each rank (`local`);
- what is whole, but sees a part of the tokens (norms, biases added after a row-wise product) or a
  part of the heads (norms of queries and keys), holds a part of its gradient (`partial`);
- what runs before the first block sees every token on every rank (`local`);
- beside a head that is cut by vocabulary a rank sees a part of the loss (`partial`); a head that is
  whole is computed by every rank alike (`local`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from shoal.errors import ModelError
from shoal.models.experts import experts_of
from shoal.models.families.tensor import TensorTable, tensor_table


@dataclass(frozen=True)
class Placement:
    """How one parameter lies on the tensor axis.

    `style`: `column`, `row`, `vocabulary` (cut), `whole`, or `unplaced`. `dim`: the dimension that
    is cut, or None. `pieces`: sizes along `dim` of parts that are cut each by itself (empty: one
    part). `gradient`: `local` (right as it is) or `partial` (to be summed over the tensor axis).
    """

    style: str
    dim: int | None = None
    gradient: str = "local"
    pieces: tuple[int, ...] = ()


@dataclass(frozen=True)
class Parts:
    """What placements need to know of an anatomy (paths from the model)."""

    base: str
    blocks: str
    norm: str | None
    head: str | None
    ties: Sequence[Sequence[str]]


UNPLACED = Placement("unplaced")
_LOCAL, _PARTIAL = Placement("whole"), Placement("whole", gradient="partial")
_OF_OUTPUTS = ("lora_b", "lora_magnitude")
"""Of an adapter (models/adapter.py): a row for each output of the layer."""


def placements_of(model: nn.Module, parts: Parts) -> Mapping[str, Placement]:
    """Placement by canonical parameter name (a tied name resolves to its group's)."""
    table = tensor_table(model.config)
    names = [name for name, _ in model.named_parameters()]
    if table is None:
        return dict.fromkeys(names, UNPLACED)
    aliases = {name: group for group in parts.ties for name in group}
    vocabulary = _vocabulary_modules(model)
    placer = _Placer(model, parts, table, vocabulary)
    return {name: placer.place(aliases.get(name, (name,))) for name in names}


def regions_of(model: nn.Module, *, base: str) -> list[str]:
    """Paths of the modules whose input is whole along the sequence: they hold column-wise layers.

    A mixture of experts is one, whatever is in it. Empty for a family that is not cut along tensor.
    """
    table = tensor_table(model.config)
    if table is None:
        return []
    mixtures = mixtures_of(model)
    paths = [path for path, _ in model.named_modules() if _matches(path, table.columns, base=base)]
    plain = [path.rpartition(".")[0] for path in paths if not _inside(path, mixtures)]
    return list(dict.fromkeys([*plain, *mixtures]))


def mixtures_of(model: nn.Module) -> list[str]:
    """Paths of the modules that hold experts and their router: their output is a sum of both."""
    return [path.rpartition(".")[0] for path in experts_of(model)]


def _inside(path: str, outer: Sequence[str]) -> bool:
    return any(path.startswith(each + ".") for each in outer)


def row_layers_of(model: nn.Module, *, base: str) -> dict[str, bool]:
    """Paths of the row-wise layers: their product is a part of a sum over the tensor axis.

    With whether it is made there; else it is a part of what a mixture of experts sums.
    """
    table = tensor_table(model.config)
    rows, mixtures = table.rows if table is not None else (), mixtures_of(model)
    paths = [path for path, _ in model.named_modules() if _matches(path, rows, base=base)]
    return {path: not _inside(path, mixtures) for path in paths}


def has_vocabulary_head(model: nn.Module) -> bool:
    """Whether the head's outputs are the entries of the vocabulary, and so can be cut by it."""
    return _output_embedding(model) is not None


def check_placed(placements: Mapping[str, Placement], *, family: str) -> None:
    """Raise ModelError, naming the parameter, when the tensor axis has no rule for one."""
    unplaced = [name for name, each in placements.items() if each == UNPLACED]
    if not unplaced:
        return
    if len(unplaced) == len(placements):
        raise ModelError(
            f"{family}: no table says how its layers are cut along tensor\n"
            "    set parallel.tensor to 1 and use parallel.shard instead, which takes any family"
        )
    raise ModelError(
        f"{unplaced[0]}: no rule places it along the tensor axis"
        + (f", nor {len(unplaced) - 1} more" if len(unplaced) > 1 else "")
        + f"\n    {family} needs an entry for it in legal/families; until then "
        "set parallel.tensor to 1"
    )


class _Placer:
    def __init__(
        self, model: nn.Module, parts: Parts, table: TensorTable, vocabulary: list[str]
    ) -> None:
        self.model, self.parts, self.table, self.vocabulary = model, parts, table, vocabulary
        self.split_head = has_vocabulary_head(model)
        self.experts = experts_of(model)

    def place(self, names: Sequence[str]) -> Placement:
        """Placement of one parameter by any of its names."""
        found = [self._one(*name.rpartition(".")[::2]) for name in names]
        cut = [each for each in found if each.dim is not None]
        return cut[0] if cut else found[0]

    def _one(self, path: str, leaf: str) -> Placement:
        parts = self.parts
        module = self.model.get_submodule(path)
        if path in self.vocabulary:
            return _PARTIAL if leaf == "lora_a" else Placement("vocabulary", 0)
        if path in self.experts:
            return _of_experts(self.experts[path], leaf)
        pattern = _matches(path, self.table.columns, base=parts.base)
        if pattern is not None:
            if leaf == "lora_a":  # each rank's outputs give a part of its gradient
                return _PARTIAL
            pieces = self.table.pieces.get(pattern, ())
            if leaf in _OF_OUTPUTS:
                return Placement("column", 0, pieces=pieces)
            dim = 0 if leaf == "bias" or not is_transposed(module) else 1
            return Placement("column", dim, pieces=pieces)
        if _matches(path, self.table.rows, base=parts.base) is not None:
            if leaf == "lora_a":
                return Placement("row", 1)
            return (
                _PARTIAL
                if leaf in ("bias", *_OF_OUTPUTS)
                else Placement("row", int(not is_transposed(module)))
            )
        if path.startswith(parts.blocks + "."):
            # one that is neither cut nor a norm may mix tokens or heads: nobody has checked it
            whole = _matches(path, self.table.whole, base=parts.base) is not None
            return _PARTIAL if whole or "Norm" in type(module).__name__ else UNPLACED
        if path == parts.norm:
            return _PARTIAL
        inside_base = not parts.base or path.startswith(parts.base + ".")
        if inside_base:
            return _LOCAL
        return _PARTIAL if self.split_head else _LOCAL


def _of_experts(module: Any, leaf: str) -> Placement:
    """Each expert is cut as a feed-forward part is: weights [experts, outputs, inputs]."""
    plain = module.has_gate and module.is_concatenated and not module.is_transposed
    size = getattr(module, leaf).shape[1]
    if plain and leaf == "gate_up_proj":
        return Placement("column", 1, pieces=(size // 2, size // 2))
    return Placement("row", 2) if plain and leaf == "down_proj" else UNPLACED


def _matches(path: str, patterns: Sequence[str], *, base: str) -> str | None:
    """The pattern that `path` (from the model) matches inside the base model."""
    inner = path.removeprefix(base + ".") if base else path
    for pattern in patterns:
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), inner):
            return pattern
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer's weight is [inputs, outputs], as GPT-2's Conv1D has it."""
    return type(module).__name__ == "Conv1D"


def _output_embedding(model: nn.Module) -> nn.Module | None:
    wrapped: Any = model
    found = wrapped.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return found if isinstance(found, nn.Linear) else None


def _vocabulary_modules(model: nn.Module) -> list[str]:
    """Paths of the token embedding and of the output embedding."""
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    wanted = [tokens, _output_embedding(model)]
    return list(_paths_of(model, [each for each in wanted if each is not None]))


def _paths_of(model: nn.Module, wanted: Sequence[nn.Module]) -> Iterator[str]:
    for path, module in model.named_modules():
        if any(module is each for each in wanted):
            yield path
