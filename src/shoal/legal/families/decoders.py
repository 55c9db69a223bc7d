"""Llama and its relatives, mixtures of experts among them, and DeepSeek's latent attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from shoal.legal.facts import ModelFacts
from shoal.legal.families.family import (
    EVERY_AXIS,
    WITH_EXPERTS,
    ConfigReader,
    Family,
    TensorCuts,
)

Experts = Callable[[ModelFacts, ConfigReader], ModelFacts]


def _decoder(
    read: ConfigReader,
    *,
    bias: Literal["none", "keyed", "queries_keys_values"] = "keyed",
    inner_bias: bool = False,
    head_norms: bool = False,
    norms: int = 2,
    tied: bool = False,
    windowed: Callable[[ConfigReader, int], int] = lambda read, layers: layers,
    experts: Experts | None = None,
) -> ModelFacts:
    """RMS norms, rotary positions, gated feed-forward part.

    `bias`: of attention (`keyed`: where the file has attention_bias); `inner_bias`: the file may
    have mlp_bias. `head_norms`: of queries and keys. `norms`: per block. `tied`: by default.
    `windowed`: from the number of layers, how many have the sliding window.
    """
    hidden, heads = read.hidden, read.heads
    groups = read.integer("num_key_value_heads", default=heads)
    size = read.integer("head_dim", default=hidden // heads)
    block = read.block(groups=groups, head_size=size)
    queries, keys, inner = heads * size, groups * size, block["feed_forward"]
    attention = hidden * (queries + 2 * keys) + queries * hidden + norms * hidden
    if bias == "queries_keys_values":
        attention += queries + 2 * keys
    elif bias == "keyed" and read.flag("attention_bias", default=False):
        attention += queries + 2 * keys + hidden
    if head_norms:
        attention += 2 * size
    window, window_layers = _window(read, windowed)
    biased = inner_bias and read.flag("mlp_bias", default=False)
    dense = ModelFacts(
        **block,
        **read.ends(tied=tied),
        gated=True,
        window=window,
        window_layers=window_layers,
        attention_parameters=attention,
        feed_forward_parameters=3 * hidden * inner + (2 * inner + hidden if biased else 0),
        final_parameters=hidden,
    )
    return experts(dense, read) if experts is not None else dense


def _latent_decoder(
    read: ConfigReader, *, shared: int, dense_layers: int, chosen: int | None = None
) -> ModelFacts:
    """DeepSeek: attention through low-rank latents, shared experts beside the routed ones.

    `shared`, `dense_layers`, `chosen`: numbers of these where the file does not say.
    """
    hidden, heads = read.hidden, read.heads
    latent, rotary = read.integer("kv_lora_rank"), read.integer("qk_rope_head_dim")
    plain, value = read.integer("qk_nope_head_dim"), read.integer("v_head_dim")
    rank, size = read.integer("q_lora_rank", default=0), plain + rotary
    queries = hidden * rank + rank + rank * heads * size if rank else hidden * heads * size
    attention = queries + hidden * (latent + rotary) + latent + latent * heads * (plain + value)
    attention += heads * value * hidden + 2 * hidden
    block = read.block(head_size=size, value_size=value)
    dense = ModelFacts(
        **block,
        **read.ends(tied=False),
        gated=True,
        attention_parameters=attention,
        feed_forward_parameters=3 * hidden * block["feed_forward"],
        final_parameters=hidden,
    )
    inner = read.integer("moe_intermediate_size")
    return _with_experts(
        dense,
        read,
        inner=inner,
        experts=read.integer("n_routed_experts"),
        chosen=chosen,
        shared=inner * read.integer("n_shared_experts", default=shared),
        dense_layers=min(dense.layers, read.integer("first_k_dense_replace", default=dense_layers)),
        coefficient=0.0,  # transformers has no such loss for them
    )


def _window(read: ConfigReader, windowed: Callable[[ConfigReader, int], int]) -> tuple[int, int]:
    """(window in tokens, number of blocks that have it), (0, 0) when attention is full."""
    window, layers = read.config.get("sliding_window"), read.integer("num_hidden_layers")
    if not window or not read.flag("use_sliding_window", default=True):
        return 0, 0
    kinds = read.config.get("layer_types")
    if kinds:
        return int(window), sum(kind == "sliding_attention" for kind in kinds)
    return int(window), windowed(read, layers)


def _all_but_each_last(read: ConfigReader, layers: int) -> int:
    return layers - layers // read.integer("sliding_window_pattern", default=6)


def _upper(read: ConfigReader, layers: int) -> int:
    return max(0, layers - read.integer("max_window_layers", default=28))


def _with_experts(
    dense: ModelFacts,
    read: ConfigReader,
    *,
    inner: int,
    experts: int,
    chosen: int | None = None,
    shared: int = 0,
    extra: int = 0,
    dense_layers: int = 0,
    coefficient: float = 0.001,
) -> ModelFacts:
    """Add what a mixture of experts has beside a dense model; a router chooses among `experts`.

    `inner`: width of one expert; `chosen`: experts of a token where the file does not say;
    `shared`: width of the part that all tokens use; `extra`: parameters; `coefficient`: of the
    balance loss where the file does not say.
    """
    hidden = dense.hidden
    return replace(
        dense,
        experts=experts,
        experts_per_token=read.integer("num_experts_per_tok", default=chosen),
        expert_feed_forward=inner,
        shared_feed_forward=shared,
        dense_layers=dense_layers,
        balanced=read.flag("output_router_logits", default=False)
        and bool(read.config.get("router_aux_loss_coef", coefficient)),
        expert_parameters=3 * hidden * inner,
        expert_shared_parameters=hidden * experts + 3 * hidden * shared + extra,
    )


def _mixtral_experts(dense: ModelFacts, read: ConfigReader) -> ModelFacts:
    experts = read.integer("num_local_experts", default=8)
    return _with_experts(dense, read, inner=dense.feed_forward, experts=experts, chosen=2)


def _qwen_experts(
    dense: ModelFacts, read: ConfigReader, *, chosen: int, shared: bool = False
) -> ModelFacts:
    step = read.integer("decoder_sparse_step", default=1)
    skipped = read.config.get("mlp_only_layers") or ()
    return _with_experts(
        dense,
        read,
        inner=read.integer("moe_intermediate_size"),
        experts=read.integer("num_experts", default=read.config.get("num_local_experts")),
        chosen=chosen,
        shared=read.integer("shared_expert_intermediate_size") if shared else 0,
        extra=dense.hidden if shared else 0,
        dense_layers=sum(at in skipped or (at + 1) % step != 0 for at in range(dense.layers)),
    )


_PLANNED = TensorCuts()
_PHI3 = TensorCuts(
    columns={
        "layers.*.self_attn.qkv_proj": ("queries", "keys", "keys"),
        "layers.*.mlp.gate_up_proj": ("inner", "inner"),
    },
    rows=("layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"),
    # its attention slices the fused projection by the configuration
    per_rank=(
        *("num_key_value_heads", "config.num_attention_heads", "config.num_key_value_heads"),
    ),
)


def _mixture(shared: str = "", *, latent: bool = False) -> TensorCuts:
    """Of a mixture of experts: `shared` is the name of the experts that all tokens use.

    The experts themselves are cut by their inner width (models/placement.py). `latent`: heads are
    made of low-rank latents, which every rank computes.
    """
    names = ("q_proj", "q_b_proj", "kv_b_proj") if latent else ("q_proj", "k_proj", "v_proj")
    dense = ("mlp", f"mlp.{shared}") if shared else ("mlp",)
    columns = [f"layers.*.self_attn.{name}" for name in names]
    columns += [f"layers.*.{each}.{name}" for each in dense for name in ("gate_proj", "up_proj")]
    whole = ["mlp.gate", "mlp.shared_expert_gate"]
    whole += ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"]
    return TensorCuts(
        columns=dict.fromkeys(columns, ()),
        rows=("layers.*.self_attn.o_proj", *(f"layers.*.{each}.down_proj" for each in dense)),
        whole=tuple(f"layers.*.{each}" for each in whole),
    )


def _entry(tensor: TensorCuts | None = _PLANNED, logits: Any = None, **sizes: Any) -> Family:
    return Family(
        sizes=partial(_decoder, **sizes),
        axes=WITH_EXPERTS if sizes.get("experts") else EVERY_AXIS,
        tensor=tensor,
        blocks="layers",
        norm="norm",
        logits=logits,
    )


_CAP: Any = ("cap", "final_logit_softcapping")
_GEMMA: dict[str, Any] = {"norms": 4, "tied": True}
_GEMMA3 = {**_GEMMA, "head_norms": True, "windowed": _all_but_each_last}
_QWEN2: dict[str, Any] = {"bias": "queries_keys_values", "windowed": _upper}

FAMILIES: dict[str, Family] = {
    "llama": _entry(inner_bias=True),
    "qwen2": _entry(**_QWEN2),
    "qwen3": _entry(head_norms=True, windowed=_upper),
    "mistral": _entry(bias="none"),
    "gemma2": _entry(**_GEMMA, windowed=lambda read, layers: layers - layers // 2, logits=_CAP),
    "gemma3_text": _entry(**_GEMMA3, logits=_CAP),
    "gemma3": _entry(None, **_GEMMA3),
    "granite": _entry(inner_bias=True, logits=("divide", "logits_scaling")),
    "mixtral": _entry(_mixture(), bias="none", experts=_mixtral_experts),
    "qwen2_moe": _entry(
        _mixture("shared_expert"), **_QWEN2, experts=partial(_qwen_experts, chosen=4, shared=True)
    ),
    "qwen3_moe": _entry(
        _mixture(), head_norms=True, windowed=_upper, experts=partial(_qwen_experts, chosen=8)
    ),
    "phi3": _entry(_PHI3, bias="none"),
    "deepseek_v2": Family(
        sizes=partial(_latent_decoder, shared=2, dense_layers=0),
        axes=WITH_EXPERTS,
        tensor=_mixture("shared_experts", latent=True),
    ),
    "deepseek_v3": Family(
        sizes=partial(_latent_decoder, shared=1, dense_layers=3, chosen=8),
        axes=WITH_EXPERTS,
        tensor=_mixture("shared_experts", latent=True),
    ),
    "cohere": Family(blocks="layers", norm="norm", logits=("multiply", "logit_scale")),
}
