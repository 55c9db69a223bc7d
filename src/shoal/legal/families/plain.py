"""Families of square projections, layer norms and biases: GPT-2, GPT-NeoX, BERT, ViT; and T5."""

from __future__ import annotations

from typing import Any

from shoal.legal.facts import ModelFacts
from shoal.legal.families.family import (
    EVERY_AXIS,
    WITHOUT_CONTEXT,
    ConfigReader,
    Family,
    SizeKeys,
    TensorCuts,
)


def _plain(
    read: ConfigReader, *, inner: int | None = None, biased: bool = True, **others: Any
) -> ModelFacts:
    """A block of four square projections and an ungated feed-forward part, layer norms, biases.

    `others`: fields of ModelFacts, those of embedding and head among them.
    """
    hidden, block = read.hidden, read.block(inner=inner)
    inner = int(block["feed_forward"])
    return ModelFacts(
        **block,
        gated=False,
        attention_parameters=4 * (hidden * hidden + (hidden if biased else 0)) + 4 * hidden,
        feed_forward_parameters=2 * hidden * inner + inner + hidden,
        **others,
    )


def _gpt2(read: ConfigReader) -> ModelFacts:
    activation = read.config.get("activation_function") or "gelu_new"
    return _plain(
        read,
        inner=read.integer("n_inner", default=4 * read.hidden),
        # gelu_new is a formula of five operations, each of which keeps what it reads
        activation_copies=5 if activation == "gelu_new" else 2,
        final_parameters=2 * read.hidden,
        **read.ends(tied=True, rows=read.integer("n_positions")),
    )


def _gpt_neox(read: ConfigReader) -> ModelFacts:
    biased = read.flag("attention_bias", default=True)
    ends = read.ends(tied=False)
    return _plain(read, biased=biased, final_parameters=2 * read.hidden, **ends)


def _bert(read: ConfigReader) -> ModelFacts:
    hidden, rows = read.hidden, read.integer("max_position_embeddings")
    ends = read.ends(tied=True, rows=rows + read.integer("type_vocab_size", default=2) + 2)
    kind, dense = read.head_kind(default="ForMaskedLM"), hidden * hidden + hidden
    if "MaskedLM" in kind or "CausalLM" in kind or "LMHead" in kind:
        ends["head_parameters"] += dense + 2 * hidden + ends["vocabulary"]
    elif "Classification" in kind or "QuestionAnswering" in kind:
        labels, pooled = read.labels(), dense if "Sequence" in kind else 0
        head = pooled + hidden * labels + labels
        ends |= {"vocabulary": labels, "tied": False, "head_parameters": head}
    else:
        ends["head_parameters"] = dense
    return _plain(read, causal=False, **ends)


def _vit(read: ConfigReader) -> ModelFacts:
    hidden, labels = read.hidden, read.labels()
    patch, image = read.integer("patch_size"), read.integer("image_size")
    patches = (image // patch) ** 2
    embedding = read.integer("num_channels", default=3) * patch**2 * hidden + hidden
    return _plain(
        read,
        vocabulary=labels,
        causal=False,
        embedding_parameters=embedding + hidden + (patches + 1) * hidden,
        head_parameters=hidden * labels + labels,
        final_parameters=2 * hidden,
        fixed_tokens=patches + 1,
    )


def _t5(read: ConfigReader) -> ModelFacts:
    hidden, size = read.hidden, read.integer("d_kv")
    block = read.block(head_size=size)
    encoders, inner = block["layers"], block["feed_forward"]
    decoders = read.integer("num_decoder_layers", default=encoders)
    gated = "gated" in str(read.config.get("feed_forward_proj", "relu"))
    attention = 4 * hidden * read.heads * size
    buckets = read.integer("relative_attention_num_buckets", default=32)
    return ModelFacts(
        **{**block, "layers": encoders + decoders},
        **read.ends(tied=True),
        gated=gated,
        causal=False,
        cross_layers=decoders,
        attention_parameters=attention + 2 * hidden,
        feed_forward_parameters=(3 if gated else 2) * hidden * inner,
        final_parameters=2 * hidden,
        extra_parameters=decoders * (attention + hidden) + 2 * buckets * read.heads,
    )


_GPT2 = TensorCuts(
    columns={"h.*.attn.c_attn": ("queries", "keys", "keys"), "h.*.mlp.c_fc": ()},
    rows=("h.*.attn.c_proj", "h.*.mlp.c_proj"),
    per_rank=("split_size", "num_heads"),  # by which it splits its fused projection
)
_BERT = TensorCuts(
    columns={
        "encoder.layer.*.attention.self.query": (),
        "encoder.layer.*.attention.self.key": (),
        "encoder.layer.*.attention.self.value": (),
        "encoder.layer.*.intermediate.dense": (),
    },
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
    "bert": Family(sizes=_bert, axes=WITHOUT_CONTEXT, tensor=_BERT, blocks="encoder.layer"),
    "roberta": Family(
        sizes=_bert,
        axes=WITHOUT_CONTEXT,
        tensor=_BERT,
        blocks="encoder.layer",
    ),
    # it calls forward of its blocks by name, so that nothing gathers what shard cut
    "squeezebert": Family(axes=frozenset({"replicate"})),
    "vit": Family(
        sizes=_vit,
        blocks="layers",
        norm="layernorm",
        hidden="first_token_of_image",
    ),
    "yolos": Family(
        blocks="encoder.layer",
        norm="layernorm",
        head="class_labels_classifier",
        hidden="detection_tokens_of_image",
    ),
    "whisper": Family(blocks="encoder.layers", more_blocks=("decoder.layers",)),
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
    ),
}
