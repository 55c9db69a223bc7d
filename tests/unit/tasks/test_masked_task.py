"""Hidden tokens: which ones, against transformers' data collator, and the loss of its BERT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
)

from shoal.data.tokenize import MASK, load_tokenizer, train_tokenizer
from shoal.errors import DataError
from shoal.fields import IGNORED
from shoal.models.anatomy import anatomy_of
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.splitmix import mixed
from shoal.tasks.masked_lm import MaskedLM, uniform
from shoal.tasks.task import Scores, Tools
from tiny import tales


@pytest.fixture(scope="module")
def tools() -> Tools:
    texts = tales(seed=0, documents=50)
    folder = train_tokenizer([texts], vocabulary_size=300, cache_key="masked", masks=True)
    return Tools(load_tokenizer(folder), end_token_id=1, special_texts={"mask_token": MASK})


def made(tools: Tools, **options: float) -> MaskedLM:
    task = MaskedLM(options=options)
    task.learn([], tools=tools)
    return task


def rows(task: MaskedLM, tools: Tools, *, count: int, length: int = 64) -> dict[str, np.ndarray]:
    """`count` rows of real tokens, as the data gives them."""
    texts = [{"text": text} for text in tales(seed=1, documents=count)]
    samples = task.encode(texts, tools=tools)
    ids = np.concatenate([each["input_ids"] for each in samples])
    labels = np.concatenate([each["labels"] for each in samples])
    count = len(ids) // length
    return {
        "input_ids": ids[: count * length].reshape(count, length),
        "labels": labels[: count * length].reshape(count, length),
        "sample_ids": np.arange(count),
        "source_ids": np.zeros(count, dtype=np.int64),
    }


def shares(ids: np.ndarray, labels: np.ndarray, before: np.ndarray, mask: int) -> np.ndarray:
    """Of all tokens: targets; of targets: hidden, replaced, and left as they are."""
    targets = labels != IGNORED
    hidden, same = (ids == mask) & targets, (ids == before) & targets
    number = targets.sum()
    others = (targets & ~hidden & ~same).sum()
    return np.array(
        [number / ids.size, hidden.sum() / number, others / number, same.sum() / number]
    )


def test_shares_are_those_of_transformers_collator(tools: Tools) -> None:
    task = made(tools)
    batch = rows(task, tools, count=4000)
    drawn = task.drawn(batch, seed=0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tools.tokenizer, mask_token=MASK, pad_token="<|pad|>", eos_token="<|end|>"
    )
    torch.manual_seed(0)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    theirs = collate([{"input_ids": row} for row in batch["input_ids"].tolist()])
    mask = task.settings["mask"]
    wanted = shares(theirs["input_ids"].numpy(), theirs["labels"].numpy(), batch["input_ids"], mask)
    found = shares(drawn["input_ids"], drawn["labels"], batch["input_ids"], mask)
    number = (drawn["labels"] != IGNORED).sum()
    # two draws of a share p of n differ by 4 of their standard errors once in 15,000 times
    errors = np.sqrt(2 * wanted * (1 - wanted) / np.array([batch["input_ids"].size, *[number] * 3]))
    assert (np.abs(found - wanted) < 4 * errors).all(), (found, wanted)
    special = np.isin(batch["input_ids"], task.settings["special"])
    assert special.any() and (drawn["labels"][special] == IGNORED).all()
    assert (
        drawn["input_ids"][drawn["labels"] == IGNORED]
        == batch["input_ids"][drawn["labels"] == IGNORED]
    ).all(), "what is no target stays"
    assert (
        drawn["labels"][drawn["labels"] != IGNORED]
        == batch["input_ids"][drawn["labels"] != IGNORED]
    ).all(), "a label is the token that stood there"


def test_masks_are_keyed_by_seed_source_sample_and_position(tools: Tools) -> None:
    task = made(tools)
    batch = rows(task, tools, count=400)
    whole = task.drawn(batch, seed=7)
    order = np.array([5, 2, 9])
    few = task.drawn({name: each[order, ...] for name, each in batch.items()}, seed=7)
    short = task.drawn(
        {name: each[order, :16] if each.ndim == 2 else each[order] for name, each in batch.items()},
        seed=7,
    )
    for name in ("labels", "input_ids"):
        assert (few[name] == whole[name][order]).all(), "whatever else is in the batch"
        assert (short[name] == whole[name][order, :16]).all(), "and however it is cut"
    for other in (
        task.drawn(batch, seed=8),
        task.drawn({**batch, "sample_ids": batch["sample_ids"] + 1000}, seed=7),
        task.drawn({**batch, "source_ids": batch["source_ids"] + 1}, seed=7),
    ):
        same = ((other["labels"] != IGNORED) & (whole["labels"] != IGNORED)).mean()
        assert same == pytest.approx(0.15**2, abs=0.006), "as independent draws"


def test_drawn_numbers_are_uniform() -> None:
    numbers = uniform(mixed(np.arange(20000, dtype=np.uint64)))
    assert numbers.mean() == pytest.approx(0.5, abs=0.01) and 0 <= numbers.min() < 0.001


def test_the_loss_is_that_of_berts_own_class(tools: Tools) -> None:
    """In float64, gradients included, padded rows beside full ones."""
    task = made(tools)
    config = read_config(
        architecture="bert",
        settings={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        },
        vocabulary_size=300,
    )
    ours = build_meta(config, auto_class=task.auto_class)
    materialise(ours, record=record(ours), seed=0)
    ours.double().eval()
    theirs = BertForMaskedLM(BertConfig(**{**config.to_dict(), "attn_implementation": "eager"}))
    theirs.load_state_dict(ours.state_dict())
    theirs.double().eval()
    batch = {
        name: torch.from_numpy(each)[:6]
        for name, each in task.drawn(rows(task, tools, count=200, length=24), seed=0).items()
    }
    documents = torch.zeros(6, 24, dtype=torch.int32)
    documents[2, 17:] = -1
    batch["labels"][2, 17:] = IGNORED
    batch |= {"document_ids": documents, "position_ids": torch.arange(24).expand(6, -1)}
    count = task.count(batch)
    total = task.output(ours, anatomy_of(ours), batch).total()
    (total / count).backward()
    loss = theirs(
        input_ids=batch["input_ids"],
        attention_mask=(documents >= 0).long(),
        labels=batch["labels"],
    ).loss
    loss.backward()
    assert float(total.detach()) / count == pytest.approx(float(loss.detach()), rel=1e-9)
    for name, parameter in ours.named_parameters():
        wanted = theirs.get_parameter(name).grad
        assert torch.allclose(parameter.grad, wanted, rtol=1e-6, atol=1e-10), name


def test_hidden_tokens_found_are_counted(tools: Tools) -> None:
    metrics = made(tools).metrics()
    labels = np.array([[5, IGNORED, 7], [8, 9, IGNORED]])
    guesses = torch.tensor([[5, 1, 6], [8, 9, 1]])
    losses = torch.tensor([[1.0, 0.0, 2.0], [3.0, 4.0, 0.0]])
    batch = {"labels": labels, "sample_ids": np.array([0, -1])}
    metrics.add(batch=batch, scores=Scores(losses, guesses))
    found = metrics.result()
    assert found == {
        "evaluation_loss": 1.5,
        "perplexity": pytest.approx(np.exp(1.5)),
        "accuracy": 0.5,
        "evaluation_targets": 2.0,
    }


def test_a_tokenizer_without_a_mask_token(tools: Tools) -> None:
    with pytest.raises(DataError, match=r"a mask token, got none.*\n.*tokenizer.kind=train"):
        MaskedLM().learn([], tools=Tools(tools.tokenizer))
    with pytest.raises(DataError, match=r"a mask token, got \[MASK\] in"):
        MaskedLM().learn([], tools=Tools(tools.tokenizer, special_texts={"mask_token": "[MASK]"}))
