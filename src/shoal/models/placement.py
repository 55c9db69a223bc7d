"""Placement of every parameter on the tensor axis, with its gradient rule.

transformers ships `base_model_tp_plan` for most families. This table adds what a plan leaves out;
the tensor strategy reads it. A parameter that no rule places has style `unplaced`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_STYLES: dict[str, tuple[int | None, int | None]] = {
    # style of the plan: (dim of a weight that is cut, dim of a bias that is cut)
    "colwise": (0, 0),
    "colwise_gather_output": (0, 0),
    "colwise_rep": (0, 0),
    "rowwise": (1, None),
    "rowwise_rep": (1, None),
    "embedding_rowwise": (0, None),
}


@dataclass(frozen=True)
class Placement:
    """How one parameter lies on the tensor axis.

    `style`: transformers' word, or `replicated` or `unplaced`. `dim`: the dimension that is cut, or
    None. `gradient`: `local` (the gradient of a rank is right as it is) or `partial` (each rank
    holds a part of it: summed over the tensor axis).
    """

    style: str
    dim: int | None = None
    gradient: str = "local"


def placements_of(
    model: nn.Module, *, base: str, ties: Sequence[Sequence[str]]
) -> Mapping[str, Placement]:
    """Placement by canonical parameter name (a tied name resolves to its group's)."""
    plan = _whole_plan(model, base)
    aliases = {name: group for group in ties for name in group}
    blocks_planned = any("*" in pattern for pattern in plan)
    return {
        name: _place(aliases.get(name, (name,)), plan, blocks_planned)
        for name, _ in model.named_parameters()
    }


def _whole_plan(model: nn.Module, base: str) -> dict[str, str]:
    config: Any = model.config
    below = getattr(config, "base_model_tp_plan", None) or {}
    plan = {f"{base}.{pattern}" if base else pattern: style for pattern, style in below.items()}
    plan.update(getattr(model, "_tp_plan", None) or {})
    return {pattern: style for pattern, style in plan.items() if isinstance(style, str)}


def _place(names: Sequence[str], plan: Mapping[str, str], blocks_planned: bool) -> Placement:
    for name in names:
        path, _, leaf = name.rpartition(".")
        for pattern, style in plan.items():
            if not re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), path):
                continue
            if style in _STYLES:
                return Placement(style, _STYLES[style][0 if leaf == "weight" else 1])
            if style == "replicated_with_grad_allreduce":
                return Placement(style, None, "partial")
            return Placement(style)
    # outside the plan but beside it (norms of the residual stream): whole, gradient equal on ranks
    return Placement("replicated" if blocks_planned else "unplaced")
