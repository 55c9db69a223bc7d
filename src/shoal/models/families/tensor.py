"""Which layers of a model are cut along the tensor axis: the family's entry, for one configuration.

The module that holds the column-wise layers is a region: what enters it is whole along the
sequence, everything between regions is split along it (arXiv 2205.05198).

Fused projections stay fused: each of their pieces is cut by itself, and the pieces of a rank lie
next to one another. So the model's own forward, its names and its export are untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from shoal.legal import facts_from_config, family_of


@dataclass(frozen=True)
class TensorTable:
    """Layers by pattern (paths inside the base model, `*` is one name).

    `pieces`: sizes, along the cut dim, of what a fused column-wise layer holds one after the other.
    `per_rank`: attributes of a region that count heads.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    whole: tuple[str, ...]
    pieces: Mapping[str, tuple[int, ...]]
    per_rank: tuple[str, ...]

    def localise(self, region: nn.Module, degree: int) -> None:
        """Correct counts that a region's forward reads from an attribute, in place."""
        if not self.per_rank or not hasattr(region, self.per_rank[0]):
            return
        module: Any = region
        if any(path.startswith("config.") for path in self.per_rank):
            module.config = copy.copy(module.config)
        for path in self.per_rank:
            owner, _, name = path.rpartition(".")
            holder = getattr(module, owner) if owner else module
            setattr(holder, name, getattr(holder, name) // degree)


def tensor_table(config: Any) -> TensorTable | None:
    """The table of a configuration's family; None for one that is not cut along tensor."""
    cuts = family_of(str(config.model_type)).tensor
    if cuts is None:
        return None
    columns, rows = tuple(cuts.columns), cuts.rows
    if not columns:
        plan = getattr(config, "base_model_tp_plan", None) or {}
        columns = tuple(pattern for pattern, style in plan.items() if style == "colwise")
        rows = tuple(pattern for pattern, style in plan.items() if style == "rowwise")
    if not columns:
        return None
    return TensorTable(columns, rows, cuts.whole, _pieces(config, cuts.columns), cuts.per_rank)


def _pieces(config: Any, named: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[int, ...]]:
    if not any(named.values()):
        return {}
    facts = facts_from_config(config.to_dict())
    sizes = {
        "queries": facts.heads * facts.head_size,
        "keys": facts.key_value_heads * facts.head_size,
        "inner": facts.feed_forward,
    }
    return {pattern: tuple(sizes[each] for each in names) for pattern, names in named.items()}
