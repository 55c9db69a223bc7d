"""Which layers of each family are cut along the tensor axis; the base is transformers' own plan.

A column-wise layer is cut by its outputs (heads, neurons), a row-wise one by its inputs, so that
attention and the feed-forward part need one exchange before and one after (Megatron-LM, arXiv
1909.08053). The module that holds the column-wise layers is a region: what enters it is whole along
the sequence, everything between regions is split along it (arXiv 2205.05198).

Fused projections stay fused: each of their pieces is cut by itself, and the pieces of a rank lie
next to one another. So the model's own forward, its names and its export are untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Pieces = Callable[[Any], tuple[int, ...]]
"""From a config: sizes, along the cut dim, of what a fused layer holds one after the other."""


@dataclass(frozen=True)
class TensorTable:
    """Layers by pattern (paths inside the base model, `*` is one name).

    `pieces`: of fused column-wise layers. `localise(attention, degree)`: corrects counts of heads
    that a region's forward reads from an attribute instead of from its weights.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    pieces: Mapping[str, Pieces] = field(default_factory=dict)
    localise: Callable[[nn.Module, int], None] = field(default=lambda module, degree: None)


def _localise_gpt2(module: nn.Module, degree: int) -> None:
    """GPT-2 splits its fused projection by an attribute."""
    attention: Any = module
    if hasattr(module, "split_size"):
        attention.split_size //= degree
        attention.num_heads //= degree


def _localise_phi3(module: nn.Module, degree: int) -> None:
    """Phi-3 slices its fused projection by the configuration."""
    attention: Any = module
    if hasattr(module, "qkv_proj"):
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads //= degree
        attention.config.num_key_value_heads //= degree
        attention.num_key_value_heads //= degree


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _queries_keys_values(config: Any) -> tuple[int, ...]:
    keys = config.num_key_value_heads * _head_size(config)
    return (config.num_attention_heads * _head_size(config), keys, keys)


_GPT2 = TensorTable(
    columns=("h.*.attn.c_attn", "h.*.mlp.c_fc"),
    rows=("h.*.attn.c_proj", "h.*.mlp.c_proj"),
    pieces={"h.*.attn.c_attn": lambda config: (config.hidden_size,) * 3},
    localise=_localise_gpt2,
)

_PHI3 = TensorTable(
    columns=("layers.*.self_attn.qkv_proj", "layers.*.mlp.gate_up_proj"),
    rows=("layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"),
    pieces={
        "layers.*.self_attn.qkv_proj": _queries_keys_values,
        "layers.*.mlp.gate_up_proj": lambda config: (config.intermediate_size,) * 2,
    },
    localise=_localise_phi3,
)

_BERT = TensorTable(
    columns=(
        "encoder.layer.*.attention.self.query",
        "encoder.layer.*.attention.self.key",
        "encoder.layer.*.attention.self.value",
        "encoder.layer.*.intermediate.dense",
    ),
    rows=("encoder.layer.*.attention.output.dense", "encoder.layer.*.output.dense"),
)

_CORRECTED = {"gpt2": _GPT2, "phi3": _PHI3, "bert": _BERT, "roberta": _BERT}
"""Families whose plan transformers lacks (gpt2, bert), or whose plan gathers (phi3)."""

_PLANNED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "granite", "gpt_neox")
"""Families whose plan is right as transformers ships it; each is tested against one worker.

gpt_neox keeps query, key and value of a head together, so plain cuts along its fused projection
fall between heads.
"""


def tensor_table(config: Any) -> TensorTable | None:
    """The table of a configuration's family; None for one that is not cut along tensor."""
    family = str(config.model_type)
    if family in _CORRECTED:
        return _CORRECTED[family]
    plan = getattr(config, "base_model_tp_plan", None)
    if family not in _PLANNED or not plan:
        return None
    return TensorTable(
        columns=tuple(pattern for pattern, style in plan.items() if style == "colwise"),
        rows=tuple(pattern for pattern, style in plan.items() if style == "rowwise"),
    )
