"""What a family does to the output of its head: a scale, or a soft cap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shoal.legal import family_of

Transform = Callable[[Tensor], Tensor]


def transform_of(config: Any) -> Transform | None:
    """What turns a head's output into the model's logits; None: nothing."""
    rule = family_of(config.model_type).logits
    number = getattr(config, rule[1], None) if rule is not None else None
    if rule is None or number is None:
        return None
    transforms: dict[str, Transform] = {
        "divide": lambda logits: logits / number,
        "multiply": lambda logits: logits * number,
        # cap x tanh(logits / cap) (Gemma 2, arXiv 2408.00118)
        "cap": lambda logits: torch.tanh(logits / number) * number,
    }
    return transforms[rule[0]]
