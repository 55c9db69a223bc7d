"""What each family does differently from what can be read off its modules.

A family is a transformers `model_type`. An unknown family gets the defaults: everything is then
read from the modules, checked on a few tokens, and refused what fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Correction:
    """How a family departs from the default reading of its modules.

    `blocks`, `norm`: paths inside the base model, where they cannot be found by looking.
    `logits`: from the config, what happens to the head's output. `attention_dropout`: config keys
    that drop attention probabilities.
    """

    blocks: str | None = None
    norm: str | None = None
    causal: bool = True
    logits: Callable[[Any], Transform | None] = field(default=lambda config: None)


def _divided(key: str) -> Callable[[Any], Transform]:
    return lambda config: lambda logits: logits / getattr(config, key)


def _multiplied(key: str) -> Callable[[Any], Transform]:
    return lambda config: lambda logits: logits * getattr(config, key)


def _capped(config: Any) -> Transform | None:
    """Soft cap of the logits: cap x tanh(logits / cap) (Gemma 2, arXiv 2408.00118)."""
    cap = getattr(config, "final_logit_softcapping", None)
    return None if cap is None else (lambda logits: torch.tanh(logits / cap) * cap)


LLAMA_LIKE = Correction(blocks="layers", norm="norm")
GPT2 = Correction(blocks="h", norm="ln_f")
BERT = Correction(blocks="encoder.layer", causal=False)

FAMILIES: dict[str, Correction] = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "gpt2": GPT2,
    "bert": BERT,
    "gemma2": Correction(blocks="layers", norm="norm", logits=_capped),
    "granite": Correction(blocks="layers", norm="norm", logits=_divided("logits_scaling")),
    "cohere": Correction(blocks="layers", norm="norm", logits=_multiplied("logit_scale")),
}


def correction_of(family: str) -> Correction:
    """The correction of a family; the defaults when it is not known."""
    return FAMILIES.get(family, Correction())
