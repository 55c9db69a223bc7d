"""Answers in texts: where they stand, SQuAD's scores, and the loss of transformers' BERT."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from shoal.data.readers import reader_of
from shoal.data.tokenize import load_tokenizer, train_tokenizer
from shoal.errors import DataError
from shoal.fields import IGNORED
from shoal.models.anatomy import anatomy_of
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.tasks.span_answering import (
    LONGEST_ANSWER,
    SpanAnswering,
    best_spans,
    is_same,
    word_f1,
)
from shoal.tasks.task import Scores, Tools
from tiny import tales

TEXT = "The lamp keeper finds the silver key before sunrise, at 7° in März."


def question(answer: str, *more: str, text: str = TEXT) -> dict[str, Any]:
    texts = [answer, *more] if answer else []
    return {
        "question": "Who finds it?",
        "text": text,
        "answers": {"text": texts, "answer_start": [text.index(each) for each in texts]},
    }


@pytest.fixture(scope="module")
def tools() -> Tools:
    folder = train_tokenizer([tales(seed=0, documents=50)], vocabulary_size=300, cache_key="spans")
    return Tools(load_tokenizer(folder), sequence_tokens=64)


def learned(tools: Tools, *records: dict[str, Any]) -> SpanAnswering:
    task = SpanAnswering()
    task.learn(records or [question("sunrise")], tools=tools)
    return task


@pytest.mark.parametrize("answer", ["lamp keeper", "März", "7°", "The", "."])
def test_targets_are_the_tokens_of_the_answer(tools: Tools, answer: str) -> None:
    """And the bytes that they stand for are the answer, with at most the space before it."""
    task = learned(tools)
    (sample,) = task.encode([question(answer)], tools=tools)
    first, last = sample["labels"]
    start, stop = sample["places"][0, first], sample["places"][1, last]
    assert bytes(sample["context"][start:stop]).decode().strip() == answer
    said = tools.tokenizer.decode(sample["input_ids"][first : last + 1])
    assert said.strip() == answer
    assert (sample["places"][:, : len(tools.tokenizer.encode("Who finds it?").ids)] == 0).all()


def test_an_answer_that_was_cut_off_is_no_target(tools: Tools) -> None:
    task = learned(tools)
    short = Tools(tools.tokenizer, sequence_tokens=24)
    (sample,) = task.encode([question("März")], tools=short)
    assert sample["labels"] == [IGNORED, IGNORED] and len(sample["input_ids"]) == 24
    with pytest.raises(DataError, match=r"alone fills a row of 3 tokens.*\n.*sequence_tokens"):
        task.encode([question("März")], tools=Tools(tools.tokenizer, sequence_tokens=3))


def test_no_answer_is_the_first_token(tools: Tools) -> None:
    task = learned(tools, question("sunrise"), question(""))
    assert task.settings["open"] and task.notes == ["2 questions, 1 of them without an answer"]
    (sample,) = task.encode([question("")], tools=tools)
    assert sample["labels"] == [0, 0]


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("The silver key", "silver key.", 1, 1),
        ("a silver, silver key", "silver key", 0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("sunrise", "before sunrise", 0, 2 * 1 * (1 / 2) / (1 + 1 / 2)),
        ("key", "lamp", 0, 0),
        ("", "lamp", 0, 0),
        ("lamp", "", 0, 0),
        ("", "", 1, 1),
        ("the", "a", 1, 1),
        ("March 7th-8th", "march 7th8th", 1, 1),
        ("atheism", "ism", 0, 0),
    ],
)
def test_scores_are_squads(said: str, right: str, exact: float, f1: float) -> None:
    """By the rules of its evaluation script, worked out by hand: lower case, then punctuation out,
    then articles as whole words, then blanks."""
    assert is_same(said, right) == exact
    assert word_f1(said, right) == pytest.approx(f1)


def test_the_best_of_all_right_answers_counts(tools: Tools) -> None:
    """`keeper finds` is half of one answer, `silver key` all of another, the last row filling."""
    task = learned(tools)
    records = [question("lamp keeper"), question("sunrise", "silver key")]
    samples = task.encode([*records, records[0]], tools=tools)
    width = [max(len(each[name]) for each in samples) for name in ("context", "answers")]
    batch = {
        "labels": np.array([each["labels"] for each in samples]),
        "places": np.stack([each["places"] for each in samples]),
        **{
            name: np.stack([np.pad(each[name], (0, size - len(each[name]))) for each in samples])
            for name, size in zip(("context", "answers"), width)
        },
        "sample_ids": np.array([0, 1, -1]),
    }
    other = [task.encode([question(x)], tools=tools)[0]["labels"] for x in ("keeper", "silver key")]
    found = torch.tensor([*other, [0, 0]])
    metrics = task.metrics()
    losses = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    metrics.add(batch=batch, scores=Scores(losses, found))
    assert metrics.result() == {
        "evaluation_loss": 2.5,
        "exact_match": 0.5,
        "f1": pytest.approx((2 / 3 + 1) / 2),
        "evaluation_targets": 4.0,
    }


@pytest.mark.parametrize("nullable", [False, True])
def test_the_likeliest_span_by_trying_all(nullable: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 40, 2, generator=draw, dtype=torch.float64)
    is_text = torch.zeros(8, 40, dtype=torch.bool)
    is_text[:7, 5:38] = True
    logits[3, 0] = 9
    found = best_spans(logits, is_text=is_text, nullable=nullable)
    for row in range(8):
        tried = {
            (first, last): float(logits[row, first, 0] + logits[row, last, 1])
            for first, last in itertools.product(range(40), repeat=2)
            if first <= last < first + LONGEST_ANSWER and is_text[row, first] and is_text[row, last]
        }
        wanted = max(tried, key=tried.__getitem__) if tried else (0, 0)
        if nullable and tried and float(logits[row, 0].sum()) > tried[wanted]:
            wanted = (0, 0)
        assert tuple(found[row].tolist()) == wanted
    assert tuple(found[3].tolist()) == (0, 0) or not nullable


def test_the_loss_is_that_of_transformers_on_each_row_alone(tools: Tools) -> None:
    """transformers counts padding among the places; shoal does not, so a row's loss is the same
    beside a longer one. In float64, gradients included, with a row that only fills the batch."""
    task = learned(tools)
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
    theirs = BertForQuestionAnswering(BertConfig(**config.to_dict())).double().eval()
    theirs.load_state_dict(ours.state_dict())
    short = question("key", text="a key")
    samples = task.encode([question("lamp keeper"), short, question("März")], tools=tools)
    size = max(len(each["input_ids"]) for each in samples)
    typed = task.settings["typed"]
    batch: dict[str, torch.Tensor] = {
        "input_ids": torch.zeros(4, size, dtype=torch.long),
        "document_ids": torch.full((4, size), -1, dtype=torch.int32),
        "position_ids": torch.arange(size).repeat(4, 1),
        "places": torch.zeros(4, 2, size, dtype=torch.int32),
        "labels": torch.full((4, 2), IGNORED),
        **({"token_type_ids": torch.zeros(4, size, dtype=torch.long)} if typed else {}),
    }
    losses = []
    for row, sample in enumerate(samples):
        count = len(sample["input_ids"])
        for name in ("input_ids", "token_type_ids", "places"):
            if name in sample:
                batch[name][row, ..., :count] = torch.as_tensor(np.asarray(sample[name]))
        batch["document_ids"][row, :count] = 0
        batch["labels"][row] = torch.tensor(sample["labels"])
        alone = {
            name: (each if name == "labels" else each[..., :count])[row : row + 1].clone()
            for name, each in batch.items()
        }
        losses.append(theirs(**task.user_call(alone)).loss)
    (sum(losses) / 3).backward()
    total = task.output(ours, anatomy_of(ours), batch).total()
    assert task.count(batch) == 6
    (total / 6).backward()
    assert float(total.detach()) / 6 == pytest.approx(float(sum(losses).detach()) / 3, rel=1e-9)
    for name, parameter in ours.named_parameters():
        wanted = theirs.get_parameter(name).grad
        assert torch.allclose(parameter.grad, wanted, rtol=1e-6, atol=1e-10), name


def squad(path: Path, *questions: dict[str, Any], context: Any = TEXT) -> Path:
    article = {"title": "x", "paragraphs": [{"context": context, "qas": list(questions)}]}
    path.write_text(json.dumps({"version": "1.1", "data": [article]}), encoding="utf-8")
    return path


def test_squads_file_and_its_columns_are_read(tmp_path: Path, tools: Tools) -> None:
    asked = {"id": "1", "question": "Who?", "answers": [{"text": "lamp", "answer_start": 4}]}
    path = squad(tmp_path / "a.json", asked, {"id": "2", "question": "Why?", "is_impossible": True})
    first, second = reader_of(path)(path)
    assert first["text"] == TEXT and first["question"] == "Who?" and second["answers"] == []
    row = {
        "context": TEXT,
        "question": "Who?",
        "answers": {"text": ["lamp"], "answer_start": [4]},
    }
    lines = tmp_path / "b.jsonl"
    lines.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (third,) = reader_of(lines)(lines)
    task = learned(tools, first, second, third)
    samples = task.encode([first, third], tools=tools)
    assert samples[0]["labels"] == samples[1]["labels"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({**question("lamp"), "question": " "}, r"expected text under 'question', got ' '.*SQuAD"),
        ({"text": TEXT, "question": "Who?"}, r"expected `answers` with lists.*got None.*'Who\?'"),
        (
            {**question("lamp"), "answers": {"text": ["lamp"], "answer_start": []}},
            "of equal length, got",
        ),
        (
            {**question("lamp"), "answers": {"text": ["lamp"], "answer_start": [5]}},
            r"'lamp' does not stand at character 5 .*which has 'amp ",
        ),
    ],
)
def test_bad_records(tools: Tools, record: dict[str, Any], problem: str) -> None:
    task = learned(tools)
    with pytest.raises(DataError, match=f"(?s){problem}"):
        task.learn([record], tools=tools)
        task.encode([record], tools=tools)


def test_a_file_of_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": TEXT}]}]}), encoding="utf-8")
    with pytest.raises(DataError, match=r"entry 1, paragraph 1: expected a list under 'qas'"):
        list(reader_of(path)(path))
    squad(path, {"question": "Who?"}, context=None)
    with pytest.raises(
        DataError, match=r"entry 1, paragraph 1: expected text in 'context', got null"
    ):
        list(reader_of(path)(path))
