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

from shoal.models.families.hidden import Hidden, first_token_of_image, hidden_of_decoder

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Correction:
    """How a family departs from the default reading of its modules.

    `blocks`, `norm`, `head`: paths (the first two inside the base model) where they cannot be found
    by looking; `more_blocks`: a second list of blocks. `logits`: from the config, what happens to
    the head's output. `hidden`: what runs the base model where it is not one call on tokens.
    `first_position`: from the config, the position id of a document's first token. `packs`: whether
    documents may share a row.
    """

    blocks: str | None = None
    more_blocks: tuple[str, ...] = ()
    norm: str | None = None
    head: str | None = None
    causal: bool = True
    packs: bool = True
    logits: Callable[[Any], Transform | None] = field(default=lambda config: None)
    hidden: Hidden | None = None
    first_position: Callable[[Any], int] = field(default=lambda config: 0)


def _divided(key: str) -> Callable[[Any], Transform]:
    return lambda config: lambda logits: logits / getattr(config, key)


def _multiplied(key: str) -> Callable[[Any], Transform]:
    return lambda config: lambda logits: logits * getattr(config, key)


def _capped(config: Any) -> Transform | None:
    """Soft cap of the logits: cap x tanh(logits / cap) (Gemma 2, arXiv 2408.00118)."""
    cap = getattr(config, "final_logit_softcapping", None)
    return None if cap is None else (lambda logits: torch.tanh(logits / cap) * cap)


LLAMA_LIKE = Correction(blocks="layers", norm="norm")
BERT = Correction(blocks="encoder.layer", causal=False)

FAMILIES: dict[str, Correction] = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "gpt2": Correction(blocks="h", norm="ln_f"),
    "gpt_neox": Correction(blocks="layers", norm="final_layer_norm"),
    "bert": BERT,
    # positions of RoBERTa begin after the id of padding (fairseq's convention)
    "roberta": Correction(
        blocks="encoder.layer",
        causal=False,
        first_position=lambda config: config.pad_token_id + 1,
    ),
    "gemma2": Correction(blocks="layers", norm="norm", logits=_capped),
    "gemma3_text": Correction(blocks="layers", norm="norm", logits=_capped),
    "granite": Correction(blocks="layers", norm="norm", logits=_divided("logits_scaling")),
    "cohere": Correction(blocks="layers", norm="norm", logits=_multiplied("logit_scale")),
    "vit": Correction(
        blocks="layers", norm="layernorm", causal=False, packs=False, hidden=first_token_of_image
    ),
    "t5": Correction(
        blocks="encoder.block",
        more_blocks=("decoder.block",),
        norm="decoder.final_layer_norm",
        head="lm_head",
        packs=False,
        hidden=hidden_of_decoder,
    ),
}


def correction_of(family: str) -> Correction:
    """The correction of a family; the defaults when it is not known."""
    return FAMILIES.get(family, Correction())
