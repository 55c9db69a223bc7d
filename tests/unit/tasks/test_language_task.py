import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from shoal.errors import DataError
from shoal.models.anatomy import anatomy_of, head_parameters
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.tasks.causal_lm import CausalLM, end_token_id


def _tokenizer(*special: str) -> Tokenizer:
    words = [*special, "the", "sea", "is", "blue", "?"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def test_documents_close_with_the_end_token() -> None:
    tokenizer = _tokenizer("<|endoftext|>")
    records = [{"text": "the sea"}, {"text": ""}]
    samples = CausalLM().encode(records, tokenizer=tokenizer)
    assert samples == [{"input_ids": [1, 2, 0]}, {"input_ids": [0]}]


def test_without_an_end_token_nothing_is_added() -> None:
    samples = CausalLM().encode([{"text": "is blue"}], tokenizer=_tokenizer())
    assert samples == [{"input_ids": [2, 3]}]


def test_a_template_keeps_its_begin_token_and_no_second_end() -> None:
    tokenizer = _tokenizer("<s>", "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    samples = CausalLM().encode([{"text": "sea"}], tokenizer=tokenizer)
    assert samples == [{"input_ids": [0, 3, 1]}]


def test_a_tokenizer_that_cuts_or_pads_does_not_here() -> None:
    tokenizer = _tokenizer()
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=8)
    samples = CausalLM().encode([{"text": "the sea is"}], tokenizer=tokenizer)
    assert samples == [{"input_ids": [0, 1, 2]}]


def test_the_end_token_may_be_named() -> None:
    tokenizer = _tokenizer("<a>", "</s>")
    assert end_token_id(tokenizer) == 1
    assert end_token_id(tokenizer, name="<a>") == 0
    task = CausalLM({"end_token": "<a>"})
    assert task.settings([]) == {"end_token": "<a>"}
    assert task.encode([{"text": "sea"}], tokenizer=tokenizer) == [{"input_ids": [3, 0]}]
    with pytest.raises(DataError, match="no token '<z>'"):
        end_token_id(tokenizer, name="<z>")


def test_records_without_text_are_refused() -> None:
    with pytest.raises(DataError, match=r"string under 'text', got keys \['words'\]"):
        CausalLM().encode([{"words": ["a"]}], tokenizer=_tokenizer())


def test_forward_gives_states_targets_and_head() -> None:
    config = read_config(
        architecture="llama",
        settings={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "num_key_value_heads": 1, "intermediate_size": 16},
        vocabulary_size=9,
    )  # fmt: skip
    model = build_meta(config, auto_class=CausalLM.auto_class)
    materialise(model, record=record(model), seed=0)
    ids = torch.arange(8).view(2, 4)
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    output = CausalLM().forward(model, anatomy_of(model), batch)
    assert output.hidden.shape == (2, 4, 16) and output.labels is batch["labels"]
    assert output.logits_of(output.hidden).shape == (2, 4, 9)
    assert output.head_parameters == head_parameters(model)


def test_scores_add_up_over_ranks_and_skip_doubled_rows() -> None:
    labels = torch.tensor([[1, 2, -100], [3, -100, -100], [4, 4, 4]])
    losses = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    ids = torch.tensor([0, 1, -1])  # the last row only fills the batch
    whole = CausalLM().metrics()
    whole.add(batch={"labels": labels, "sample_ids": ids}, losses=losses)
    parts = [CausalLM().metrics() for _ in range(2)]
    for row, part in enumerate(parts):
        one = slice(row, row + 1)
        part.add(batch={"labels": labels[one]}, losses=losses[one])
    together = parts[0].vector() + parts[1].vector()
    assert whole.result(together) == whole.result()
    assert whole.result() == {
        "evaluation_loss": 2.0,
        "perplexity": pytest.approx(math.e**2),
        "evaluation_targets": 3.0,
    }
    assert not whole.needs_predictions


def test_scores_of_nothing_and_of_divergence() -> None:
    metrics = CausalLM().metrics()
    assert math.isnan(metrics.result()["evaluation_loss"])
    metrics.add(batch={"labels": torch.ones(1, 1)}, losses=torch.full((1, 1), 1e4))
    assert metrics.result()["perplexity"] == math.inf
