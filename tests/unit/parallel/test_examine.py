"""Models against transformers as a user calls it: what is right, and how a mistake is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as functional
from torch import Tensor, nn

import seq2seq
from seq2seq import Seq2Seq
from shoal.errors import ModelError
from shoal.models import anatomy, attention
from shoal.models.huggingface import read_config
from shoal.parallel.model import ModelSettings
from shoal.parallel.oracle import Verdict, examine
from shoal.tasks.kinds import create
from shoal.tasks.token_classification import TokenClassification
from unit.models.tiny_models import SETTINGS

ROUNDING = 1e-6
"""transformers computes softmax, norms and losses in float32 in a float64 model too."""

TAGS = {"tags": ["O", "B-A", "I-A"]}

ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def verdict(
    family: str,
    *,
    task: str = "causal-lm",
    dropout: str = "off",
    packing: bool = False,
    sequence_tokens: int = 32,
    is_drawn: bool = True,
    **settings: Any,
) -> Verdict:
    """Of a small configuration of `family`."""
    chosen = Seq2Seq() if task == Seq2Seq.kind else create(task, settings=TAGS)
    special = chosen.model_settings() if task == Seq2Seq.kind else {}
    config = read_config(
        architecture=family,
        settings={"vocab_size": 61, **special, **SETTINGS.get(family, {}), **settings},
        vocabulary_size=61,
    )
    return examine(
        ModelSettings(config, chosen.auto_class, 0, dropout),
        task=chosen,
        packing=packing,
        sequence_tokens=sequence_tokens,
        is_drawn=is_drawn,
    )


DECODERS = [f for f in SETTINGS if f not in ("bert", "roberta", "vit", "t5")]


@pytest.mark.parametrize("family", [*DECODERS, "mixtral", "olmo2", "opt", "stablelm"])
def test_decoders_agree_with_transformers_padded_and_packed(family: str) -> None:
    # a cap of 0.05, as the tiny models of other tests have it, makes rounding 30 times as large
    more = {"final_logit_softcapping": 30.0} if family == "gemma2" else {}
    found = verdict(family, packing=True, **more)
    assert found.problems == () and found.packs
    assert 0.0 < found.difference <= ROUNDING


@pytest.mark.parametrize("family", ["falcon", "gptj", "codegen", "bloom", "mpt"])
def test_decoders_with_attention_of_their_own_are_right_unless_packed(family: str) -> None:
    found = verdict(family)
    assert found.problems == () and found.notes == ("attention of its own",)
    assert found.difference <= ROUNDING and not found.packs
    (problem,) = verdict(family, packing=True).problems
    assert "a document in a packed row differs from the same document alone" in problem
    assert "set data.packing to false" in problem


@pytest.mark.parametrize(
    ("family", "first"),
    [
        *(("bert", 0), ("electra", 0), ("roberta", 2), ("xlm-roberta", 2), ("camembert", 2)),
        *(("roberta-prelayernorm", 2), ("mpnet", 2), ("data2vec-text", 2), ("xlm-roberta-xl", 2)),
    ],
)
def test_encoders_count_positions_as_transformers_does(family: str, first: int) -> None:
    found = verdict(family, task="token-classification", **ENCODER)
    assert found.problems == () and found.difference <= ROUNDING
    assert (f"positions from {first} on" in found.notes) == bool(first)


@pytest.mark.parametrize("family", ["deberta", "deberta-v2", "roformer", "megatron-bert"])
def test_encoders_with_attention_of_their_own_do_not_see_padding(family: str) -> None:
    found = verdict(family, task="token-classification", **ENCODER)
    assert found.problems == () and "attention of its own" in found.notes


@pytest.mark.parametrize("family", ["bert", "roberta", "ernie", "megatron-bert"])
def test_an_encoder_as_a_causal_language_model_sees_its_targets(family: str) -> None:
    (problem,) = verdict(family, **ENCODER).problems
    assert problem.startswith("a token sees those after it") and "use a decoder" in problem


@pytest.mark.parametrize("family", ["yoso", "nystromformer", "convbert"])
def test_a_family_that_mixes_padding_in_is_refused_by_that_name(family: str) -> None:
    (problem,) = verdict(family, task="token-classification", **ENCODER).problems
    assert "its own code sees padding" in problem and "in transformers" in problem


@pytest.mark.parametrize("family", ["t5", "mt5", "bart", "mbart", "marian", "m2m_100"])
def test_encoder_decoders_agree_with_transformers_called_with_labels(family: str) -> None:
    """T5's two halves without a base model, BART's with one; mBART's own way to shift labels."""
    found = verdict(family, task=Seq2Seq.kind)
    assert found.problems == () and found.difference <= ROUNDING


def test_another_first_token_of_a_decoder_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seq2seq, "decoder_inputs", lambda model, labels: labels.clamp(min=0))
    (problem, _) = verdict("bart", task=Seq2Seq.kind).problems
    assert problem.startswith("its logits differ from transformers' by")


def test_attention_to_chosen_tokens_is_refused_where_they_are_fewer_than_a_row() -> None:
    """DeepSeek 3.2 attends to the `index_topk` tokens that an indexer of its own chooses."""
    (problem,) = verdict("deepseek_v32").problems
    assert "its own code sees padding" in problem


def test_a_model_whose_first_weights_nothing_draws_needs_pretrained_ones() -> None:
    """transformers leaves the projections of OpenAI GPT as they happen to lie in memory."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    with pytest.raises(ModelError, match="_init_weights does not initialise it"):
        verdict("openai-gpt", **sizes)
    assert verdict("openai-gpt", is_drawn=False, **sizes).problems == ()


def test_a_family_whose_own_loss_is_another_one_is_refused() -> None:
    """BART's class for language modelling does not shift its labels."""
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    (problem,) = verdict("bart", **sizes, decoder_ffn_dim=48, max_position_embeddings=64).problems
    assert problem.startswith("its loss is ") and "where transformers' is " in problem


@pytest.mark.parametrize("positions", [16, 64])
def test_rotary_frequencies_that_depend_on_the_longest_row_of_a_call(positions: int) -> None:
    """Within max_position_embeddings they are those of the configuration, and do not."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    problems = verdict(
        "llama", rope_parameters=rope, max_position_embeddings=positions, sequence_tokens=32
    ).problems
    assert len(problems) == (positions < 32)
    if problems:
        assert "its rotary frequencies depend on the longest row of a call" in problems[0]
        assert "set data.sequence_tokens to at most max_position_embeddings" in problems[0]


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_kinds_of_rotary_scaling_are_right(kind: str) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    found = verdict("llama", rope_parameters=rope, max_position_embeddings=16, packing=True)
    assert found.problems == ()


def test_rows_longer_than_a_table_of_positions_are_refused() -> None:
    (problem,) = verdict("gpt2", n_positions=16, sequence_tokens=32).problems
    assert problem.startswith("it has no position 31, which rows of 32 tokens need")


def test_noise_of_a_models_own_is_found_in_training_mode() -> None:
    sizes = {**SETTINGS["llama"], "num_local_experts": 4, "router_jitter_noise": 0.1}
    (problem,) = verdict("mixtral", **sizes).problems
    assert "training changes its logits" in problem and "model.dropout=framework" in problem


def test_numbers_that_matter_now_and_then_only_are_noticed() -> None:
    """PhiMoE chooses between experts by chance, but only where two are nearly even."""
    (problem,) = verdict("phimoe", **SETTINGS["llama"]).problems
    assert "numbers of its own, which have no key" in problem


def test_keyed_dropout_that_cannot_be_keyed_is_refused() -> None:
    (problem,) = verdict("opt", dropout="keyed").problems
    assert "drops values in its own code, which has no key" in problem


@pytest.mark.parametrize(
    ("family", "task", "said"),
    [
        ("xmod", "token-classification", "transformers cannot run it on its rows"),
        ("hunyuan_v1_dense", "causal-lm", "transformers cannot run it on its rows"),
        ("electra", "causal-lm", "it is not called as shoal calls models"),
    ],
)
def test_an_architecture_that_cannot_be_run_so_is_refused_with_the_reason(
    family: str, task: str, said: str
) -> None:
    with pytest.raises(ModelError, match=f"{family} for the task {task}: {said}"):
        verdict(family, task=task, **ENCODER)


def forgetful(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any):
    repeated = (each.repeat_interleave(2, dim=1) for each in (key, value))
    output = functional.scaled_dot_product_attention(query, *repeated, is_causal=True)
    return output.transpose(1, 2), None


def test_attention_that_forgets_documents_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attend", forgetful)
    attention.register()
    try:
        assert verdict("llama").problems == ()
        (problem,) = verdict("llama", packing=True).problems
        assert "a document in a packed row differs" in problem
    finally:
        monkeypatch.undo()
        attention.register()


def test_positions_that_are_not_corrected_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "_first_position", lambda base: 0)
    problems = verdict("roberta", task="token-classification", **ENCODER).problems
    assert "its logits differ from transformers' by" in problems[0]


def test_labels_in_another_place_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(self: Any, model: nn.Module, anatomy: Any, batch: Any, *, step: int = 0) -> Any:
        rolled = {**batch, "labels": batch["labels"].roll(1, dims=1)}
        return original(self, model, anatomy, rolled, step=step)

    original = TokenClassification.output
    monkeypatch.setattr(TokenClassification, "output", shifted)
    (problem,) = verdict("bert", task="token-classification", **ENCODER).problems
    assert problem.startswith("its loss is ")


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("task", ["masked-lm", "span-answering"])
def test_encoders_hide_tokens_and_answer_as_transformers_has_them(family: str, task: str) -> None:
    """Logits and loss; for hidden tokens, documents of one packed row as well."""
    found = verdict(family, task=task, packing=task == "masked-lm", **ENCODER)
    assert found.problems == () and found.difference < ROUNDING
