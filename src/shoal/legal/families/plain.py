"""Families of square projections, layer norms and biases: GPT-2, GPT-NeoX, BERT, ViT; and T5."""

from __future__ import annotations

from shoal.legal.facts import ModelFacts
from shoal.legal.families.family import (
    EVERY_AXIS,
    WITHOUT_CONTEXT,
    ConfigReader,
    Family,
    SizeKeys,
    TensorCuts,
)


def plain(
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
    )


def _gpt2(read: ConfigReader) -> ModelFacts:
    hidden, positions = read.integer("n_embd"), read.integer("n_positions")
    inner = read.integer("n_inner", default=4 * hidden)
    tied = read.flag("tie_word_embeddings", default=True)
    vocabulary = read.integer("vocab_size")
    activation = read.config.get("activation_function") or "gelu_new"
    return plain(
        family=read.family,
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


def _gpt_neox(read: ConfigReader) -> ModelFacts:
    hidden, vocabulary = read.integer("hidden_size"), read.integer("vocab_size")
    tied = read.flag("tie_word_embeddings", default=False)
    return plain(
        family=read.family,
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


def _bert(read: ConfigReader) -> ModelFacts:
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
    return plain(
        family=read.family,
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


def _vit(read: ConfigReader) -> ModelFacts:
    hidden, labels = read.integer("hidden_size"), read.labels()
    patch, image = read.integer("patch_size"), read.integer("image_size")
    patches = (image // patch) ** 2
    embedding = read.integer("num_channels", default=3) * patch**2 * hidden + hidden
    return plain(
        family=read.family,
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
    )


def _t5(read: ConfigReader) -> ModelFacts:
    hidden, heads, size = read.integer("d_model"), read.integer("num_heads"), read.integer("d_kv")
    encoders = read.integer("num_layers")
    decoders = read.integer("num_decoder_layers", default=encoders)
    inner, vocabulary = read.integer("d_ff"), read.integer("vocab_size")
    gated = "gated" in str(read.config.get("feed_forward_proj", "relu"))
    attention = 4 * hidden * heads * size
    buckets = read.integer("relative_attention_num_buckets", default=32)
    tied = read.flag("tie_word_embeddings", default=True)
    return ModelFacts(
        family=read.family,
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


_GPT2 = TensorCuts(
    columns=("h.*.attn.c_attn", "h.*.mlp.c_fc"),
    rows=("h.*.attn.c_proj", "h.*.mlp.c_proj"),
    pieces={"h.*.attn.c_attn": ("queries", "keys", "keys")},
    per_rank=("split_size", "num_heads"),  # by which it splits its fused projection
)
_BERT = TensorCuts(
    columns=(
        "encoder.layer.*.attention.self.query",
        "encoder.layer.*.attention.self.key",
        "encoder.layer.*.attention.self.value",
        "encoder.layer.*.intermediate.dense",
    ),
    rows=("encoder.layer.*.attention.output.dense", "encoder.layer.*.output.dense"),
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        sizes=_gpt2,
        axes=EVERY_AXIS,
        tensor=_GPT2,
        size_keys=SizeKeys(hidden="n_embd", inner="n_inner", layers=("n_layer",), heads="n_head"),
        blocks="h",
        norm="ln_f",
    ),
    # it keeps query, key and value of a head together, so plain cuts fall between heads
    "gpt_neox": Family(
        sizes=_gpt_neox,
        axes=EVERY_AXIS,
        tensor=TensorCuts(),
        blocks="layers",
        norm="final_layer_norm",
    ),
    "bert": Family(
        sizes=_bert, axes=WITHOUT_CONTEXT, tensor=_BERT, blocks="encoder.layer", causal=False
    ),
    "roberta": Family(
        sizes=_bert,
        axes=WITHOUT_CONTEXT,
        tensor=_BERT,
        blocks="encoder.layer",
        causal=False,
        positions_after_padding=True,
    ),
    "vit": Family(
        sizes=_vit,
        blocks="layers",
        norm="layernorm",
        causal=False,
        packs=False,
        hidden="first_token_of_image",
    ),
    "t5": Family(
        sizes=_t5,
        size_keys=SizeKeys(
            hidden="d_model",
            inner="d_ff",
            layers=("num_layers", "num_decoder_layers"),
            heads="num_heads",
            head_size="d_kv",
        ),
        blocks="encoder.block",
        more_blocks=("decoder.block",),
        norm="decoder.final_layer_norm",
        head="lm_head",
        packs=False,
        hidden="hidden_of_decoder",
    ),
}
