"""What is legal: sizes equal to the real models, and refusals that name the nearest choice."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from shoal.errors import ModelError
from shoal.layout import Layout
from shoal.legal import (
    Combination,
    axes_of,
    facts_from_config,
    not_yet,
    open_axes,
    problems,
    rules,
    shrunk,
    tensor_degrees,
)
from shoal.legal.families.table import known_families
from shoal.legal.rules import illegal
from shoal.models.huggingface import config_from

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
PLAIN = {key: SMALL[key] for key in SMALL if key != "num_key_value_heads"}
ROUTED = {"num_experts": 8, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "qk_nope_head_dim": 16,
    "first_k_dense_replace": 1,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4, "vocab_size": 100}
VIT = {**PLAIN, "image_size": 32, "patch_size": 8}
CASES = [
    ("llama", "CausalLM", SMALL),
    ("llama", "CausalLM", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    ("llama", "CausalLM", {**SMALL, "tie_word_embeddings": True, "head_dim": 32}),
    ("qwen2", "CausalLM", SMALL),
    ("qwen3", "CausalLM", SMALL),
    ("mistral", "CausalLM", SMALL),
    ("gemma2", "CausalLM", SMALL),
    ("gemma3_text", "CausalLM", SMALL),
    ("phi3", "CausalLM", {**SMALL, "pad_token_id": 0}),
    ("granite", "CausalLM", SMALL),
    ("gpt2", "CausalLM", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 32}),
    ("gpt_neox", "CausalLM", {**PLAIN, "num_hidden_layers": 3}),
    ("bert", "MaskedLM", PLAIN),
    ("bert", "TokenClassification", {**PLAIN, "num_labels": 9}),
    ("bert", "SequenceClassification", {**PLAIN, "num_labels": 3}),
    ("roberta", "MaskedLM", PLAIN),
    ("vit", "ImageClassification", VIT),
    ("t5", "Seq2SeqLM", T5),
    ("t5", "Seq2SeqLM", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ("mixtral", "CausalLM", {**SMALL, "num_local_experts": 4}),
    ("qwen3_moe", "CausalLM", {**SMALL, **ROUTED}),
    (
        "qwen2_moe",
        "CausalLM",
        {**SMALL, **ROUTED, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 2},
    ),
    ("deepseek_v3", "CausalLM", {**LATENT, "q_lora_rank": 24, "n_group": 2, "topk_group": 1}),
    ("deepseek_v2", "CausalLM", {**LATENT, "q_lora_rank": None}),
]


@pytest.mark.parametrize(("family", "task", "settings"), CASES)
def test_counts_equal_the_model(family: str, task: str, settings: dict[str, object]) -> None:
    """The parameters read from config.json are those of the model itself, to the last one."""
    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    config.architectures = [type(model).__name__]
    facts = facts_from_config(json.loads(config.to_json_string(use_diff=False)))
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.active_parameters <= facts.parameters


def test_every_family_is_counted() -> None:
    """No family is listed as readable without a model that proves it."""
    covered = {family for family, _, _ in CASES} | {"gemma3"}  # gemma3 is read through its text
    assert covered == set(known_families())


def test_text_part_of_a_multimodal_file_is_read() -> None:
    facts = facts_from_config(
        {"model_type": "gemma3", "text_config": {**SMALL, "model_type": "gemma3_text"}}
    )
    assert facts.family == "gemma3_text"


def test_unknown_architecture_says_what_it_needs() -> None:
    with pytest.raises(ModelError, match=r"'lama' is not an architecture.*did you mean 'llama'"):
        facts_from_config({**SMALL, "model_type": "lama"})


def test_missing_size_names_key_and_family() -> None:
    with pytest.raises(ModelError, match=r"llama model, key 'num_hidden_layers'.*got None"):
        facts_from_config(
            {"model_type": "llama", **{k: v for k, v in SMALL.items() if "layers" not in k}}
        )


LLAMA = facts_from_config({**SMALL, "model_type": "llama"})


def text_of(layout: Layout, facts=LLAMA, **settings: object) -> str:
    return "\n".join(map(str, illegal(Combination(layout=layout, **settings).of_model(facts))))


def test_heads_that_do_not_divide_name_the_degrees_that_do() -> None:
    text = text_of(Layout(tensor=3))
    assert "parallel.tensor: 3 does not divide 4 query heads, 2 key-value heads" in text
    assert "degrees that do: 1, 2; the nearest is 2" in text


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 16))
def test_a_tensor_degree_is_legal_exactly_when_it_divides(
    heads: int, groups: int, degree: int
) -> None:
    facts = facts_from_config(
        {
            **SMALL,
            "model_type": "llama",
            "num_attention_heads": heads * groups,
            "num_key_value_heads": groups,
            "head_dim": 16,
            "intermediate_size": 720720,
        }
    )
    divides = groups % degree == 0 and 720720 % degree == 0
    assert (degree in tensor_degrees(facts)) == divides
    asked = Combination(layout=Layout(tensor=degree)).of_model(facts)
    assert (problems(asked) == []) == divides


def test_degrees_that_do_not_multiply() -> None:
    text = text_of(Layout(replicate=3), num_workers=4)
    assert "(replicate 3) multiply to 3 workers, but there are 4" in text
    assert "set parallel.replicate to 4" in text
    assert "lower a degree" in text_of(Layout(shard=8), num_workers=4)
    assert "the nearest count below is 6" in text_of(Layout(shard=3), num_workers=7)


def test_threads_carry_replicas_only() -> None:
    text = text_of(Layout(shard=2, tensor=2), workers="threads")
    assert "threads carry the replicate axis only, got shard, tensor" in text
    assert "set launch.workers to processes" in text
    assert not text_of(Layout(replicate=4), workers="threads")


def test_families_are_refused_axes_they_lack() -> None:
    vit = facts_from_config({**VIT, "model_type": "vit"})
    assert "a vit model cannot be cut along tensor, got 2" in text_of(Layout(tensor=2), vit)
    assert "use shard=2 instead" in text_of(Layout(tensor=2), vit)


def test_a_family_without_a_table_is_refused_tensor_until_it_has_one() -> None:
    text = "\n".join(map(str, not_yet(Combination(layout=Layout(tensor=2), family="gemma3"))))
    assert "a gemma3 model has no table for the tensor axis yet, got 2" in text
    assert "use shard=2 instead" in text
    # vit can never: that is `problems`' to say, once
    assert "no table" not in "\n".join(
        map(str, not_yet(Combination(layout=Layout(tensor=2), family="vit")))
    )


def test_kinds_of_shard_and_recompute() -> None:
    assert "did you mean 'gradients'" in text_of(Layout(shard=2), shard_level="gradient")
    text = text_of(Layout(), recompute="partial")
    assert "parallel.recompute: expected one of none, selective, full; got 'partial'" in text


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma2",
        "gemma3_text",
        "phi3",
        "granite",
        "gpt2",
        "gpt_neox",
        "bert",
        "roberta",
        "vit",
        "t5",
    ],
)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_a_shrunk_model_is_of_the_same_kind(family: str, degree: int) -> None:
    """The published sizes of each family (transformers' defaults) become small and stay legal."""
    mixed = {"use_sliding_window": True, "max_window_layers": 3}
    whole = AutoConfig.for_model(family, **(mixed if family in ("qwen2", "qwen3") else {}))
    before = json.loads(whole.to_json_string(use_diff=False))
    sizes = shrunk(before, tensor=degree, pipeline=2)
    small = config_from({**before, **sizes})
    after = json.loads(small.to_json_string(use_diff=False))
    facts, wanted = facts_from_config(before), facts_from_config(after)
    assert wanted.parameters - wanted.vocabulary * wanted.hidden * 2 < 0.01 * facts.parameters
    assert wanted.vocabulary == facts.vocabulary
    assert (wanted.heads > wanted.key_value_heads) == (facts.heads > facts.key_value_heads)
    assert set(after.get("layer_types") or ()) == set(before.get("layer_types") or ())
    if "tensor" in axes_of(family):
        assert degree in tensor_degrees(wanted)
    if degree != 2:
        return
    factory = {"bert": "MaskedLM", "roberta": "MaskedLM", "vit": "ImageClassification"}
    kind = factory.get(family, "Seq2SeqLM" if family == "t5" else "CausalLM")
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(small)
    if family != "vit":
        ids = torch.arange(24)[None]
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if family == "t5" else {})}
    else:
        inputs = {"pixel_values": torch.zeros(1, 3, small.image_size, small.image_size)}
    assert torch.isfinite(model(**inputs).logits).all()


def test_a_shrunk_model_keeps_what_its_positions_need() -> None:
    """longrope has a factor per dim of a head, so such a head keeps its size."""
    long = {"rope_type": "longrope", "long_factor": [1.0] * 24, "short_factor": [1.0] * 24}
    sizes = shrunk({**SMALL, "hidden_size": 192, "model_type": "phi3", "rope_parameters": long})
    assert sizes["hidden_size"] == 4 * 48
    assert shrunk({**SMALL, "model_type": "llama", "head_dim": 128})["head_dim"] == 16
    with pytest.raises(ModelError, match="key 'hidden_size': expected a size, found none"):
        shrunk({"model_type": "resnet"})


def test_stages_experts_and_rows() -> None:
    assert "8 stages for 7 blocks" in text_of(Layout(pipeline=8))
    assert "has no experts to spread" in text_of(Layout(shard=2, expert=2))
    routed = facts_from_config({**SMALL, **ROUTED, "model_type": "qwen3_moe"})
    assert "3 does not divide 8 experts" in text_of(Layout(shard=3, expert=3), routed)
    assert "set it to 4, or parallel.shard to 2" in text_of(Layout(context=4, expert=2), routed)
    assert not text_of(Layout(context=4, shard=2, expert=2), routed)
    whole = text_of(Layout(shard=2, expert=2), routed, offload=True)
    assert "set it to false, or parallel.shard to 4" in whole
    assert not text_of(Layout(shard=4, expert=2), routed, offload=True)
    balanced = replace(routed, balanced=True)
    assert "set it to off, or parallel.pipeline to 1" in text_of(Layout(pipeline=2), balanced)
    assert not text_of(Layout(pipeline=2), balanced, balance="off")
    assert not text_of(Layout(shard=2, tensor=2, expert=2), balanced)
    text = text_of(Layout(context=2), sequence_tokens=1022)
    assert "need rows of a multiple of 4 tokens" in text
    assert "set data.sequence_tokens to 1024" in text
    assert "a multiple of 2 tokens (a slice each)" in text_of(
        Layout(context=2), sequence_tokens=1023, context_kind="ulysses"
    )


def test_policies_and_codecs() -> None:
    assert "did you mean 'diloco'" in text_of(Layout(), policy="dilco")
    assert "did you mean 'topk'" in text_of(Layout(replicate=2), codec="top-k")
    assert "nothing to compress" in text_of(Layout(), codec="int8")
    assert "hogwild needs workers that share" in text_of(
        Layout(replicate=2), policy="hogwild", workers="processes"
    )


def test_what_is_not_there_yet_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Today every policy is; a version that lacks one would say so."""
    asked = Combination(layout=Layout(replicate=2), policy="server", codec="int8")
    assert not not_yet(asked)
    monkeypatch.setattr(rules, "IMPLEMENTED_POLICIES", frozenset({"every-step"}))
    text = "\n".join(map(str, not_yet(asked)))
    assert "the policy server is not there yet" in text and "every-step" in text
    assert not not_yet(Combination(layout=Layout(replicate=8, shard=2, context=2, tensor=2)))


TWO = {"layout": Layout(replicate=2)}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"layout": Layout(shard=2), "exact": True}, "train.exact: holds for whole replicas and"),
        ({"layout": Layout(tensor=2), "dropout": "framework"}, "which compute the same tokens"),
        ({"layout": Layout(tensor=2), "whole_logits": True}, "cannot be cut by vocabulary"),
        ({"workers": "threads", "elastic": True}, "their degree cannot shrink"),
        ({"workers": "threads", "dropout": "framework"}, "refused with threads"),
        ({"layout": Layout(tensor=2), "family": "new"}, "no table for the family new"),
        (
            {**TWO, "codec": "int8", "workers": "threads"},
            "sync.codec: int8 compresses what crosses",
        ),
        ({**TWO, "codec": "int8", "exact": True}, "train.exact: int8 rounds what each replica has"),
        ({**TWO, "policy": "gossip", "codec": "int8"}, "gossip exchanges parameters, which int8"),
        ({**TWO, "policy": "streaming-diloco", "codec": "topk"}, "a fragment is one message"),
        ({**TWO, "facts": LLAMA, "fragments": 8}, "8 fragments of whole blocks, and there are 7"),
        (
            {"layout": Layout(replicate=3), "global_batch_samples": 16},
            "3 replicas do not divide global_batch_samples 16\n    nearest degrees that do: 2, 4",
        ),
        (
            {"global_batch_samples": 16, "micro_batch_samples": 5},
            "5 does not divide a replica's share of 16 samples\n    use a divisor, such as 4",
        ),
    ],
)
def test_whatever_the_model(asked: dict[str, Any], words: str) -> None:
    (found,) = problems(Combination(**asked))
    assert words in str(found) and found.hint


def test_a_plan_chooses_among_the_axes_that_are_open() -> None:
    assert open_axes(Combination()) >= {"replicate", "shard", "tensor", "expert"}
    assert "expert" not in open_axes(Combination().of_model(LLAMA))
    assert open_axes(Combination(family="t5")) == {"replicate", "shard"}
    assert open_axes(Combination(exact=True)) == {"replicate", "pipeline"}
    assert open_axes(Combination(workers="threads")) == {"replicate"}
    assert open_axes(Combination(dropout="framework")) == {
        *("replicate", "shard", "pipeline", "expert")
    }
