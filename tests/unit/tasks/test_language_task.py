import math
import shlex

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from shoal.errors import DataError
from shoal.models.anatomy import anatomy_of, head_parameters
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.tasks.baselines import unigram_nats
from shoal.tasks.causal_lm import CausalLM
from shoal.tasks.losses import TokenCrossEntropy
from shoal.tasks.task import Scores, Tools


def _tokenizer(*special: str) -> Tokenizer:
    words = [*special, "the", "sea", "is", "blue", "?"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def test_documents_close_with_the_end_token() -> None:
    tokenizer = _tokenizer("<|endoftext|>")
    records = [{"text": "the sea"}, {"text": ""}]
    samples = CausalLM().encode(records, tools=Tools(tokenizer, 0))
    assert samples == [{"input_ids": [1, 2, 0]}, {"input_ids": [0]}]


def test_without_an_end_token_nothing_is_added() -> None:
    samples = CausalLM().encode([{"text": "is blue"}], tools=Tools(_tokenizer()))
    assert samples == [{"input_ids": [2, 3]}]


def test_a_template_keeps_its_begin_token_and_no_second_end() -> None:
    tokenizer = _tokenizer("<s>", "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    samples = CausalLM().encode([{"text": "sea"}], tools=Tools(tokenizer, 1))
    assert samples == [{"input_ids": [0, 3, 1]}]


def test_a_tokenizer_that_cuts_or_pads_does_not_here() -> None:
    tokenizer = _tokenizer()
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=8)
    samples = CausalLM().encode([{"text": "the sea is"}], tools=Tools(tokenizer))
    assert samples == [{"input_ids": [0, 1, 2]}]


def test_nothing_closes_a_document_where_no_end_token_is_known() -> None:
    tokenizer = _tokenizer("<a>", "</s>")
    records = [{"text": "sea"}]
    assert CausalLM().encode(records, tools=Tools(tokenizer)) == [{"input_ids": [3]}]
    assert CausalLM().encode(records, tools=Tools(tokenizer, 0)) == [{"input_ids": [3, 0]}]


def test_records_without_text_are_refused() -> None:
    with pytest.raises(DataError, match=r"string under 'text', got keys \['words'\]"):
        CausalLM().encode([{"words": ["a"]}], tools=Tools(_tokenizer()))


def test_output_has_states_targets_and_the_head_in_its_loss() -> None:
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
    output = CausalLM().output(model, anatomy_of(model), batch)
    assert output.hidden.shape == (2, 4, 16) and output.fields["labels"] is batch["labels"]
    assert isinstance(output.loss, TokenCrossEntropy)
    assert output.loss.logits_of(output.hidden).shape == (2, 4, 9)
    assert output.loss.head == head_parameters(model)
    # transformers shifts labels itself; what it is given here makes it see the same targets
    wanted = model(input_ids=ids, labels=ids, shift_labels=batch["labels"]).loss
    assert float(output.total().detach()) / 8 == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_scores_add_up_over_ranks_and_skip_doubled_rows() -> None:
    labels = torch.tensor([[1, 2, -100], [3, -100, -100], [4, 4, 4]])
    losses = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    ids = torch.tensor([0, 1, -1])  # the last row only fills the batch
    whole = CausalLM().metrics()
    whole.add(batch={"labels": labels, "sample_ids": ids}, scores=Scores(losses))
    parts = [CausalLM().metrics() for _ in range(2)]
    for row, part in enumerate(parts):
        one = slice(row, row + 1)
        part.add(batch={"labels": labels[one]}, scores=Scores(losses[one]))
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
    scores = Scores(torch.full((1, 1), 1e4))
    metrics.add(batch={"labels": torch.ones(1, 1)}, scores=scores)
    assert metrics.result()["perplexity"] == math.inf


def test_the_last_words_have_the_unigram_baseline_beside() -> None:
    after = {"evaluation_loss": 4.0, "perplexity": math.exp(4.0), "unigram_loss": 5.0}
    (words,) = CausalLM().words({"perplexity": 310.4}, after)
    assert words == (
        "perplexity: 310 before, 54.6 now; unigram baseline: 148 (loss 4.000 against "
        "5.000 nats per token, ratio 0.800)"
    )
    lost = CausalLM().words(None, {**after, "unigram_loss": 3.0})[0]
    assert lost.endswith("ratio 1.333); the model is still no better than it")
    assert CausalLM().words(None, after)[0].startswith("perplexity: 54.6 now;")


def test_what_to_type_next_is_in_the_recipes_own_words() -> None:
    asked = CausalLM(options={"prompts": ("It's said:\nwell",)})
    line = asked.next_command(run="runs/a", recipe="x")
    assert shlex.split(line) == ["shoal", "generate", "runs/a/model", "It's said:"]
    assert CausalLM().next_command(run="a", recipe="x").endswith("'YOUR PROMPT'")
    assert math.isnan(unigram_nats(torch.zeros(3).numpy(), train=torch.ones(3).numpy()))
