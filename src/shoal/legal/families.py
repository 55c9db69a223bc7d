"""Reads the sizes of each model family out of its config.json, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shoal.errors import ModelError, nearest
from shoal.legal.facts import ModelFacts

_EVERY_AXIS = frozenset({"replicate", "shard", "context", "tensor", "pipeline"})
_WITHOUT_CONTEXT = _EVERY_AXIS - {"context"}
_WHOLE_BLOCKS = frozenset({"replicate", "shard"})


class _Reader:
    """Reads keys of one config.json and names the one that is missing."""

    def __init__(self, config: Mapping[str, Any], *, family: str) -> None:
        self.config = config
        self.family = family

    def integer(self, key: str, *, default: int | None = None) -> int:
        """The integer at `key`; raises ModelError when it is absent and has no default."""
        value = self.config.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelError(
                f"config.json of a {self.family} model, key {key!r}: expected a whole number, got "
                f"{value!r}. Add the key, or take the config.json that belongs to the weights."
            )
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """The truth value at `key`."""
        value = self.config.get(key)
        return default if value is None else bool(value)

    def labels(self) -> int:
        """Number of classes of a classification head (two when the file does not say)."""
        names = self.config.get("id2label")
        return len(names) if names else self.integer("num_labels", default=2)

    def head_kind(self, *, default: str) -> str:
        """The class named in `architectures`, or `default`."""
        named = self.config.get("architectures") or [default]
        return str(named[0])


def _decoder(config: Mapping[str, Any], family: str) -> ModelFacts:
    """Llama and its relatives: RMS norms, rotary positions, gated feed-forward part."""
    read = _Reader(config, family=family)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    groups = read.integer("num_key_value_heads", default=heads)
    size = read.integer("head_dim", default=hidden // heads)
    inner, vocabulary = read.integer("intermediate_size"), read.integer("vocab_size")
    queries, keys = heads * size, groups * size
    attention = hidden * (queries + 2 * keys) + queries * hidden
    if family in {"qwen2", "qwen2_moe"}:
        attention += queries + 2 * keys
    elif family not in {"phi3", "mistral", "mixtral"} and read.flag(
        "attention_bias", default=False
    ):
        attention += queries + 2 * keys + hidden
    if family in {"qwen3", "qwen3_moe", "gemma3", "gemma3_text"}:
        attention += 2 * size
    norms = 4 if family in {"gemma2", "gemma3", "gemma3_text"} else 2
    attention += norms * hidden
    feed_forward = 3 * hidden * inner
    if family in {"llama", "granite"} and read.flag("mlp_bias", default=False):
        feed_forward += 2 * inner + hidden
    tied = read.flag("tie_word_embeddings", default=family.startswith("gemma"))
    window, window_layers = _windows(read)
    dense = ModelFacts(
        family=family,
        layers=read.integer("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        key_value_heads=groups,
        head_size=size,
        value_head_size=size,
        feed_forward=inner,
        vocabulary=vocabulary,
        gated=True,
        tied=tied,
        window=window,
        window_layers=window_layers,
        attention_parameters=attention,
        feed_forward_parameters=feed_forward,
        embedding_parameters=vocabulary * hidden,
        head_parameters=0 if tied else vocabulary * hidden,
        final_parameters=hidden,
    )
    return _with_experts(dense, read=read)


def _windows(read: _Reader) -> tuple[int, int]:
    """(window in tokens, number of blocks that have it), (0, 0) when attention is full."""
    window, layers = read.config.get("sliding_window"), read.integer("num_hidden_layers")
    if not window or not read.flag("use_sliding_window", default=True):
        return 0, 0
    kinds = read.config.get("layer_types")
    if kinds:
        return int(window), sum(kind == "sliding_attention" for kind in kinds)
    if read.family == "gemma2":
        return int(window), (layers + 1) // 2
    if read.family.startswith("gemma3"):
        period = read.integer("sliding_window_pattern", default=6)
        return int(window), layers - layers // period
    if read.family in {"qwen2", "qwen3", "qwen2_moe", "qwen3_moe"}:
        return int(window), max(0, layers - read.integer("max_window_layers", default=28))
    return int(window), layers


def _with_experts(dense: ModelFacts, *, read: _Reader) -> ModelFacts:
    """Add what a mixture of experts has beside a dense model; a dense family is left alone."""
    layers, hidden = dense.layers, dense.hidden
    if read.family == "mixtral":
        inner, experts = read.integer("intermediate_size"), read.integer("num_local_experts")
        chosen, shared, extra = read.integer("num_experts_per_tok"), 0, 0
        dense_layers = 0
    elif read.family in {"qwen3_moe", "qwen2_moe"}:
        inner = read.integer("moe_intermediate_size")
        experts = read.integer("num_experts", default=read.config.get("num_local_experts"))
        chosen = read.integer("num_experts_per_tok")
        own = read.family == "qwen2_moe"
        shared = read.integer("shared_expert_intermediate_size") if own else 0
        extra = hidden if own else 0
        step = read.integer("decoder_sparse_step", default=1)
        skipped = read.config.get("mlp_only_layers") or ()
        dense_layers = sum(at in skipped or (at + 1) % step != 0 for at in range(layers))
    elif read.family in {"deepseek_v2", "deepseek_v3"}:
        inner, experts = read.integer("moe_intermediate_size"), read.integer("n_routed_experts")
        chosen = read.integer("num_experts_per_tok")
        shared = inner * read.integer("n_shared_experts", default=0)
        extra, dense_layers = 0, min(layers, read.integer("first_k_dense_replace", default=0))
    else:
        return dense
    return replace(
        dense,
        experts=experts,
        experts_per_token=chosen,
        expert_feed_forward=inner,
        shared_feed_forward=shared,
        dense_layers=dense_layers,
        expert_parameters=3 * hidden * inner,
        expert_shared_parameters=hidden * experts + 3 * hidden * shared + extra,
    )


def _latent_decoder(config: Mapping[str, Any], family: str) -> ModelFacts:
    """DeepSeek: attention through low-rank latents, a shared expert beside the routed ones."""
    read = _Reader(config, family=family)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    latent, rotary = read.integer("kv_lora_rank"), read.integer("qk_rope_head_dim")
    plain, value = read.integer("qk_nope_head_dim"), read.integer("v_head_dim")
    rank, size = read.integer("q_lora_rank", default=0), plain + rotary
    queries = hidden * rank + rank + rank * heads * size if rank else hidden * heads * size
    attention = queries + hidden * (latent + rotary) + latent + latent * heads * (plain + value)
    attention += heads * value * hidden + 2 * hidden
    inner, vocabulary = read.integer("intermediate_size"), read.integer("vocab_size")
    tied = read.flag("tie_word_embeddings", default=False)
    dense = ModelFacts(
        family=family,
        layers=read.integer("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        key_value_heads=heads,
        head_size=size,
        value_head_size=value,
        feed_forward=inner,
        vocabulary=vocabulary,
        gated=True,
        tied=tied,
        attention_parameters=attention,
        feed_forward_parameters=3 * hidden * inner,
        embedding_parameters=vocabulary * hidden,
        head_parameters=0 if tied else vocabulary * hidden,
        final_parameters=hidden,
    )
    return _with_experts(dense, read=read)


def _gpt2(config: Mapping[str, Any], family: str) -> ModelFacts:
    read = _Reader(config, family=family)
    hidden, positions = read.integer("n_embd"), read.integer("n_positions")
    inner = read.integer("n_inner", default=4 * hidden)
    tied = read.flag("tie_word_embeddings", default=True)
    vocabulary = read.integer("vocab_size")
    activation = config.get("activation_function") or "gelu_new"
    return _plain(
        family=family,
        # gelu_new is a formula of five operations, each of which keeps what it reads
        activation_copies=5 if activation == "gelu_new" else 2,
        layers=read.integer("n_layer"),
        hidden=hidden,
        heads=read.integer("n_head"),
        inner=inner,
        vocabulary=vocabulary,
        tied=tied,
        embedding_parameters=(vocabulary + positions) * hidden,
        head_parameters=0 if tied else vocabulary * hidden,
        final_parameters=2 * hidden,
    )


def _gpt_neox(config: Mapping[str, Any], family: str) -> ModelFacts:
    read = _Reader(config, family=family)
    hidden, vocabulary = read.integer("hidden_size"), read.integer("vocab_size")
    tied = read.flag("tie_word_embeddings", default=False)
    return _plain(
        family=family,
        layers=read.integer("num_hidden_layers"),
        hidden=hidden,
        heads=read.integer("num_attention_heads"),
        inner=read.integer("intermediate_size"),
        vocabulary=vocabulary,
        tied=tied,
        biased=read.flag("attention_bias", default=True),
        embedding_parameters=vocabulary * hidden,
        head_parameters=0 if tied else vocabulary * hidden,
        final_parameters=2 * hidden,
    )


def _bert(config: Mapping[str, Any], family: str) -> ModelFacts:
    read = _Reader(config, family=family)
    hidden, vocabulary = read.integer("hidden_size"), read.integer("vocab_size")
    rows = vocabulary + read.integer("max_position_embeddings")
    rows += read.integer("type_vocab_size", default=2)
    tied = read.flag("tie_word_embeddings", default=True)
    kind = read.head_kind(default="ForMaskedLM")
    dense = hidden * hidden + hidden
    if "MaskedLM" in kind or "CausalLM" in kind or "LMHead" in kind:
        head = dense + 2 * hidden + vocabulary + (0 if tied else vocabulary * hidden)
    elif "Classification" in kind:
        labels = read.labels()
        vocabulary, tied = labels, False
        pooled = dense if "Sequence" in kind else 0
        head = pooled + hidden * labels + labels
    else:
        head = dense
    return _plain(
        family=family,
        layers=read.integer("num_hidden_layers"),
        hidden=hidden,
        heads=read.integer("num_attention_heads"),
        inner=read.integer("intermediate_size"),
        vocabulary=vocabulary,
        tied=tied,
        causal=False,
        embedding_parameters=rows * hidden + 2 * hidden,
        head_parameters=head,
    )


def _vit(config: Mapping[str, Any], family: str) -> ModelFacts:
    read = _Reader(config, family=family)
    hidden, labels = read.integer("hidden_size"), read.labels()
    patch, image = read.integer("patch_size"), read.integer("image_size")
    patches = (image // patch) ** 2
    embedding = read.integer("num_channels", default=3) * patch**2 * hidden + hidden
    return _plain(
        family=family,
        layers=read.integer("num_hidden_layers"),
        hidden=hidden,
        heads=read.integer("num_attention_heads"),
        inner=read.integer("intermediate_size"),
        vocabulary=labels,
        tied=False,
        causal=False,
        embedding_parameters=embedding + hidden + (patches + 1) * hidden,
        head_parameters=hidden * labels + labels,
        final_parameters=2 * hidden,
        fixed_tokens=patches + 1,
    )


def _plain(
    *,
    family: str,
    layers: int,
    hidden: int,
    heads: int,
    inner: int,
    vocabulary: int,
    tied: bool,
    embedding_parameters: int,
    head_parameters: int,
    causal: bool = True,
    biased: bool = True,
    final_parameters: int = 0,
    activation_copies: int = 2,
    fixed_tokens: int | None = None,
) -> ModelFacts:
    """A block of four square projections and an ungated feed-forward part, layer norms, biases."""
    return ModelFacts(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=heads,
        head_size=hidden // heads,
        value_head_size=hidden // heads,
        feed_forward=inner,
        vocabulary=vocabulary,
        gated=False,
        activation_copies=activation_copies,
        causal=causal,
        tied=tied,
        attention_parameters=4 * (hidden * hidden + (hidden if biased else 0)) + 4 * hidden,
        feed_forward_parameters=2 * hidden * inner + inner + hidden,
        embedding_parameters=embedding_parameters,
        head_parameters=head_parameters,
        final_parameters=final_parameters,
        fixed_tokens=fixed_tokens,
    )


def _t5(config: Mapping[str, Any], family: str) -> ModelFacts:
    read = _Reader(config, family=family)
    hidden, heads, size = read.integer("d_model"), read.integer("num_heads"), read.integer("d_kv")
    encoders = read.integer("num_layers")
    decoders = read.integer("num_decoder_layers", default=encoders)
    inner, vocabulary = read.integer("d_ff"), read.integer("vocab_size")
    gated = "gated" in str(config.get("feed_forward_proj", "relu"))
    attention = 4 * hidden * heads * size
    buckets = read.integer("relative_attention_num_buckets", default=32)
    tied = read.flag("tie_word_embeddings", default=True)
    return ModelFacts(
        family=family,
        layers=encoders + decoders,
        hidden=hidden,
        heads=heads,
        key_value_heads=heads,
        head_size=size,
        value_head_size=size,
        feed_forward=inner,
        vocabulary=vocabulary,
        gated=gated,
        causal=False,
        tied=tied,
        cross_layers=decoders,
        attention_parameters=attention + 2 * hidden,
        feed_forward_parameters=(3 if gated else 2) * hidden * inner,
        embedding_parameters=vocabulary * hidden,
        head_parameters=0 if tied else vocabulary * hidden,
        final_parameters=2 * hidden,
        extra_parameters=decoders * (attention + hidden) + 2 * buckets * heads,
    )


_LIKE_LLAMA: tuple[str, ...] = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "granite",
)
_LIKE_LLAMA += ("mixtral", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class _Family:
    read: Callable[[Mapping[str, Any], str], ModelFacts]
    axes: frozenset[str]


_FAMILIES: dict[str, _Family] = {
    **{name: _Family(_decoder, _EVERY_AXIS) for name in _LIKE_LLAMA},
    "phi3": _Family(_decoder, _EVERY_AXIS),
    "deepseek_v2": _Family(_latent_decoder, _EVERY_AXIS),
    "deepseek_v3": _Family(_latent_decoder, _EVERY_AXIS),
    "gpt2": _Family(_gpt2, _EVERY_AXIS),
    "gpt_neox": _Family(_gpt_neox, _EVERY_AXIS),
    "bert": _Family(_bert, _WITHOUT_CONTEXT),
    "roberta": _Family(_bert, _WITHOUT_CONTEXT),
    "vit": _Family(_vit, _WHOLE_BLOCKS),
    "t5": _Family(_t5, _WHOLE_BLOCKS),
}

FAMILIES = tuple(_FAMILIES)

TENSOR_FAMILIES = frozenset(
    {
        *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "granite", "phi3"),
        *("gpt2", "gpt_neox", "bert", "roberta"),
    }
)
"""Families whose layers have a table for the tensor axis (models/families/tensor.py). Others that
`axes_of` allows it are refused by `rules.not_yet` until they have one."""


def facts_from_config(config: Mapping[str, Any]) -> ModelFacts:
    """Read the sizes of a model out of its config.json (a dict).

    Raises ModelError for a missing key, and for an architecture that is not known, saying what
    would be needed to know it. Of a multimodal file with a `text_config` the text part is read.
    """
    family = str(config.get("model_type", ""))
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config, family = text, str(text.get("model_type", family))
    known = _FAMILIES.get(family)
    if known is None:
        raise ModelError(
            f"config.json, key 'model_type': {family!r} is not an architecture whose sizes shoal "
            f"can read ({nearest(family, _FAMILIES)}). It needs a reader in legal.py that gives "
            "the parameters of one block, of the embedding and of the head; until then train it "
            "with replicate only and no plan."
        )
    return known.read(config, family)


def axes_of(family: str) -> frozenset[str]:
    """The axes a family can be cut along; an unknown family has replicate and shard only."""
    known = _FAMILIES.get(family)
    return known.axes if known else _WHOLE_BLOCKS
