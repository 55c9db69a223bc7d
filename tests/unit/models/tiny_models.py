"""Tiny models of each family, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {**_DECODER, "pad_token_id": 0, "tie_word_embeddings": True},
    "qwen2": _DECODER,
    "qwen3": {**_DECODER, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**_ENCODER, "partial_rotary_factor": 0.5},
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "granite": {
        **_DECODER,
        "logits_scaling": 4.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "cohere": {**_DECODER, "logit_scale": 0.25},
    "gemma2": {**_DECODER, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 0.05},
    "gemma3_text": {
        **_DECODER,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {**_DECODER, "sliding_window": 4},
    "phi3": {**_DECODER, "pad_token_id": 0},
    "vit": {
        **{key: _ENCODER[key] for key in _ENCODER if key != "max_position_embeddings"},
        "image_size": 8,
        "patch_size": 4,
    },
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}

_ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    **_DECODER,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "pad_token_id": 0,
}

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**_DECODER, "num_local_experts": 4},
    "qwen2_moe": {**_DECODER, **_ROUTED, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**_DECODER, **_ROUTED, "head_dim": 12, "norm_topk_prob": True},
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT,
}
"""Mixtures of experts. Their stored form is another: experts lie in one tensor, and are stored
apart."""

TENSOR = tuple(family for family in SETTINGS if family not in ("cohere", "vit", "t5"))
"""Families that are cut along the tensor axis."""

ROWS_OF_TOKENS = tuple(family for family in SETTINGS if family not in ("vit", "t5"))
"""Families whose rows can hold several documents."""

FIRST = ("llama", "qwen3", "gpt2", "bert")
"""Families that the project names first; the others check that nothing is tied to those."""

VOCABULARY = 61


def config_of(family: str, **settings: Any) -> Any:
    """The configuration of a tiny model."""
    vocabulary = None if family == "vit" else VOCABULARY
    return read_config(
        architecture=family,
        settings={**{**SETTINGS, **MIXTURES}[family], **settings},
        vocabulary_size=vocabulary,
    )


_AUTO_CLASSES = {
    "bert": "AutoModelForTokenClassification",
    "roberta": "AutoModelForMaskedLM",
    "vit": "AutoModelForImageClassification",
    "t5": "AutoModelForSeq2SeqLM",
}


def auto_class_of(family: str) -> str:
    """The task's auto class that suits the family."""
    return _AUTO_CLASSES.get(family, "AutoModelForCausalLM")


def meta_model(
    family: str, *, dropout: str = "off", auto_class: str | None = None, **settings: Any
) -> nn.Module:
    """A tiny model on the meta device."""
    chosen = auto_class or auto_class_of(family)
    return build_meta(config_of(family, **settings), auto_class=chosen, dropout=dropout)


def real_model(family: str, *, seed: int = 0, dropout: str = "off", **settings: Any) -> nn.Module:
    """A tiny model with weights, in evaluation mode."""
    model = meta_model(family, dropout=dropout, **settings)
    return materialise(model, record=record(model), seed=seed).eval()


def packed_batch(*, rows: int = 2, lengths: tuple[int, ...] = (5, 8, 3)) -> dict[str, Tensor]:
    """Rows of several documents with tokens that differ between rows."""
    total = sum(lengths)
    tokens = torch.arange(rows * total).view(rows, total) * 7 % VOCABULARY
    places = torch.cat([torch.arange(length) for length in lengths])
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    return {
        "input_ids": tokens,
        "position_ids": places.expand(rows, -1),
        "document_ids": documents.int().expand(rows, -1),
        "sample_ids": torch.arange(rows),
    }


def columns(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Columns of a batch, as a batch."""
    return {n: t[:, start:stop] if t.dim() == 2 else t for n, t in batch.items()}
